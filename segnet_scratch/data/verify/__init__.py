"""Verification of a data set in VOC layout: everything wrong with it, found in one run and named by codes."""

from segnet_scratch.data.verify.verifier import Report as Report
from segnet_scratch.data.verify.verifier import verify as verify
