"""What tests and benchmarks share: the list of cases, their inputs and the measure of error."""

from __future__ import annotations

import torch

from fusedseq import registry

from .cases import DTYPES, Case, Inputs, cases, make_inputs
from .compare import (
    Baseline,
    baseline,
    check,
    evaluate,
    judge,
    naive_scan,
    recurrent_tf32,
    tf32_scan,
    torch_has,
    torch_scan,
)

__all__ = [
    "DTYPES",
    "Baseline",
    "Case",
    "Inputs",
    "baseline",
    "cases",
    "check",
    "cpu_backends",
    "device_of",
    "evaluate",
    "judge",
    "make_inputs",
    "naive_scan",
    "recurrent_tf32",
    "tf32_scan",
    "torch_has",
    "torch_scan",
]


def device_of(backend: str) -> str:
    """Where tests put the tensors of a backend: on a GPU if that is its home and there is one, else on the CPU."""
    home = getattr(registry.backends()[backend], "device", None)
    return "cuda" if home == "cuda" and torch.cuda.is_available() else "cpu"


def cpu_backends() -> list[str]:
    """The usable backends at home on a CPU, float64 included: what tests of derivatives and transforms go through.

    How an operator is known to torch does not depend on the backend, and an interpreted one would take minutes.
    """
    return [
        name
        for name, module in registry.backends().items()
        if getattr(module, "device", None) in (None, "cpu") and module.missing() is None
    ]
