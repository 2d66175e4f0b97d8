"""How the kernels of this process run: compiled for a GPU, or by Triton's interpreter on a machine without one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fusedseq.backends.tensors import matmul_tf32


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
    """`input_precision` of a product: torch's own switch says whether float32 may be rounded to TF32 on the way in."""
    return "tf32" if dtype == torch.float32 and matmul_tf32() else "ieee"
