"""`segnet report`: one HTML page of a run that needs no network, for a colleague to read or to print."""
