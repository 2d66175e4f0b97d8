"""The device on which a call's kernels run; part of the backend `triton`."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability; the interpreter stands for the newest generation."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def multiprocessors(x: Tensor) -> int:
    """How many programs that fill a multiprocessor run at once; of the interpreter's few, since all take turns."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
