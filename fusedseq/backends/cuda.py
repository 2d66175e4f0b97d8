"""The CUDA kernels: adapts tensors to `fusedseq._cuda` and says what it supports.

The recurrence is one kernel, or one launch per step (docs/gpu-scans.md); the products over all time steps around it
are torch's, and so are both products of a single cell. Allocation, the stream and the choice of device are settled
here; the module takes addresses.

Without a GPU the same kernels run under an emulator, on CPU tensors, while `emulated` is in force: for tests.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fusedseq.backends import cuda_attention
from fusedseq.backends.cuda_attention import attention_backward, attention_forward
from fusedseq.backends.cuda_cell import cell_backward, cell_forward
from fusedseq.backends.cuda_products import tf32
from fusedseq.backends.cuda_scan import scan_backward, scan_forward
from fusedseq.backends.tensors import DTYPES

if TYPE_CHECKING:
    from fusedseq.registry import Call

__all__ = [
    "attention_backward", "attention_forward", "cell_backward", "cell_forward", "device", "emulated", "how", "missing",
    "name", "scan_backward", "scan_forward", "supports",
]  # fmt: skip

name = "cuda"
device = "cuda"  # the registry offers it no other tensors, unless it is asked for by name

OLDEST = 80  # compute capability times ten

_real: Any = None
_why_missing = ""
try:
    _real = importlib.import_module("fusedseq._cuda")
except ImportError as error:
    _why_missing = f"the compiled kernels fusedseq._cuda do not load ({error})"
_emulator: Any = None


def core() -> Any:
    """The module that runs calls now."""
    return _real if _emulator is None else _emulator


@contextlib.contextmanager
def emulated(module: Any) -> Iterator[None]:
    """While the block runs, this backend is `module`, its own bindings under the emulator, and takes CPU tensors."""
    global _emulator
    from fusedseq import registry

    before, _emulator = _emulator, module
    registry.forget()
    try:
        yield
    finally:
        _emulator = before
        registry.forget()


def missing() -> str | None:
    if _emulator is not None:
        return None
    if _real is None:
        return _why_missing
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    built = _real.architectures.split()
    if not any(_runs(arch, major, minor) for arch in built):
        return (
            f"it was built for compute capabilities {', '.join(built)} and the GPU has {major}{minor}; "
            f"FUSEDSEQ_CUDA_ARCHS={major}{minor} at build time makes it fit (the oldest is {OLDEST})"
        )
    return None


def _runs(arch: str, major: int, minor: int) -> bool:
    """Whether machine code for `arch` runs on a GPU of this capability: same major version, no older minor one."""
    number = int(arch.rstrip("af"))
    exact = not arch.isdecimal()
    return number // 10 == major and (number % 10 == minor if exact else number % 10 <= minor)


def supports(call: Call) -> str | None:
    home = "cuda" if _emulator is None else "cpu"
    if call.device != home:
        return f"it runs on {home if _emulator is None else 'the emulator'}, the tensors are on {call.device}"
    if type(call).__name__ == "AttentionCall":
        return cuda_attention.supports(call)  # type: ignore[arg-type]
    if type(call).__name__ != "ScanCall":
        return f"it has no kernel for {call.cell}"
    if call.dtype not in DTYPES:
        return f"it has no kernel for {call.dtype}"
    return None


def how(call: Call) -> str:
    """What about a call depends on a setting of torch's, for `fusedseq.explain`; empty where nothing does."""
    return "TF32" if type(call).__name__ == "ScanCall" and tf32(call.dtype) else ""
