"""How the kernels of this process run: compiled for a GPU, or by Triton's interpreter on a machine without one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def _probe():
    pass


# Settled when a kernel is defined: what TRITON_INTERPRET said when triton was first imported.
INTERPRETING = not isinstance(_probe, JITFunction)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which a kernel multiplies matrices of `dtype`.

    The interpreter multiplies bfloat16 as if it were whole numbers, so there everything is multiplied in float32.
    """
    return tl.float32 if INTERPRETING else TYPES[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a product: torch's own switch says whether float32 may be rounded to TF32 on the way in.

    That is `torch.backends.cuda.matmul.fp32_precision`, and before torch 2.9 `allow_tf32`, which must not be read where
    the new one was set.
    """
    if dtype != torch.float32:
        return "ieee"
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    rounded = torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if rounded else "ieee"
