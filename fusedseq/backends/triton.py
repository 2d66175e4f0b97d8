"""The Triton kernels: for tensors on a GPU, and, to be tested without one, for tensors on a CPU under the interpreter.

Triton itself is imported when the first call asks for it, so that machines without a GPU never wait for it. What adapts
tensors to kernels stands in `triton_scan`, `triton_rows` and `triton_attention`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fusedseq import config

if TYPE_CHECKING:
    from fusedseq.registry import Call

name = "triton"
device = "cuda"  # the registry offers it no other tensors, unless it is asked for by name

OLDEST = (3, 4)
OLDEST_GPU = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Which module takes which kind of call.
_MODULES = {"ScanCall": "triton_scan", "RowCall": "triton_rows", "AttentionCall": "triton_attention"}


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@functools.cache
def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not config.settings.interpret:
        if not torch.cuda.is_available():
            return "torch sees no GPU, and TRITON_INTERPRET=1, which runs kernels without one, was not set at import"
        if torch.version.hip is not None:
            return "its kernels are for NVIDIA GPUs"
        if (capability := torch.cuda.get_device_capability()) < OLDEST_GPU:
            return f"it needs compute capability {_dotted(OLDEST_GPU)} or newer, this GPU has {_dotted(capability)}"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"it needs triton {_dotted(OLDEST)} or newer, {triton.__version__} is installed"
    if config.settings.interpret != interpreting():
        return "TRITON_INTERPRET changed after triton had been imported"
    return None


def interpreting() -> bool:
    from fusedseq.kernels.runtime import INTERPRETING

    return bool(INTERPRETING)


def supports(call: Call) -> str | None:
    if interpreting():
        if call.device not in ("cpu", "cuda"):
            return f"the interpreter takes tensors on a CPU or a GPU, these are on {call.device}"
    elif call.device != "cuda":
        return f"it runs on a GPU, the tensors are on {call.device}"
    if call.dtype not in _DTYPES:
        return f"it has no kernel for {call.dtype}"
    module = _MODULES.get(type(call).__name__)
    if module is None:
        return f"it has no kernel for {call.cell}"
    reason: str | None = importlib.import_module(f"fusedseq.backends.{module}").supports(call)
    return reason


def _later(module: str, function: str) -> Callable[..., Any]:
    """A function of a module that needs Triton, imported when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"fusedseq.backends.{module}"), function)(*args, **kwargs)

    return call


scan_forward = _later("triton_scan", "scan_forward")
scan_backward = _later("triton_scan", "scan_backward")
cell_forward = _later("triton_cell", "cell_forward")
cell_backward = _later("triton_cell", "cell_backward")
attention_forward = _later("triton_attention", "attention_forward")
attention_backward = _later("triton_attention", "attention_backward")
layer_norm_forward = _later("triton_rows", "layer_norm_forward")
layer_norm_backward = _later("triton_rows", "layer_norm_backward")
bias_activation_forward = _later("triton_rows", "bias_activation_forward")
bias_activation_backward = _later("triton_rows", "bias_activation_backward")
