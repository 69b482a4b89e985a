"""Verification of a data set in VOC layout: everything wrong with it, found in one run and named by codes."""

from segnet_scratch.data.verify.report import Report
from segnet_scratch.data.verify.verifier import verify

__all__ = ["Report", "verify"]
