"""What tests and benchmarks share: the list of cases, their inputs and the measure of error."""

from __future__ import annotations

from .cases import DTYPES, Case, Inputs, cases, make_inputs
from .compare import Baseline, baseline, check, evaluate, judge, naive_scan, torch_has, torch_scan

__all__ = [
    "DTYPES",
    "Baseline",
    "Case",
    "Inputs",
    "baseline",
    "cases",
    "check",
    "evaluate",
    "judge",
    "make_inputs",
    "naive_scan",
    "torch_has",
    "torch_scan",
]
