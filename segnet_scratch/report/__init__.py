"""`segnet report`: one HTML page of a run that needs no network, for a colleague to read or to print."""

from segnet_scratch.report.page import write_report

__all__ = ["write_report"]
