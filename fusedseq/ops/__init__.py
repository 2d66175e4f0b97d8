"""The operators: validated, differentiable, and known to torch.compile, autocast and torch.func."""

from __future__ import annotations

from fusedseq.ops.check import ArgumentTypeError, ArgumentValueError
from fusedseq.ops.frozen import Frozen
from fusedseq.ops.repeat import Repeat, prepare
from fusedseq.ops.scan import cell, scan

__all__ = ["ArgumentTypeError", "ArgumentValueError", "Frozen", "Repeat", "cell", "prepare", "scan"]
