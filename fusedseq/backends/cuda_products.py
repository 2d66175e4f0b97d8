"""Products around and within the scans of the CUDA backend that torch's library forms, and the types they are in."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fusedseq import config
from fusedseq.backends import tensors

HALF = (torch.bfloat16, torch.float16)
WORKSPACE_UNIT = 256
# Weights of a direction from which on tier step has the library form its products. Through torch a call costs some
# 90 us on the host, the kernel's own product as much with so many weights; called directly, by estimate, a tenth.
THROUGH_TORCH, DIRECTLY = 2**21, 2**18
# What the library may use for itself during a product: as much as its documentation recommends for Hopper.
LIBRARY_WORKSPACE = 32 * 2**20


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32(dtype: torch.dtype) -> bool:
    """Whether the products of the recurrence may round their operands to TF32: 10 bits of mantissa, float32 sums.

    What torch's own recurrent layers ask on a GPU: `torch.backends.cudnn.rnn.fp32_precision`, and before torch 2.9
    `torch.backends.cudnn.allow_tf32`. Read by every call, forward and backward alike.
    """
    if dtype != torch.float32:
        return False
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    precision = getattr(rnn, "fp32_precision", None)
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else precision == "tf32"


@functools.cache
def _wide_products() -> bool:
    """Whether torch multiplies halves into float32."""
    return hasattr(torch.ops.aten.mm, "dtype")


def _library_name(device: str) -> str:
    """The vendor's library, which torch has loaded, by the name that the loader knows it by."""
    return f"libcublas.so.{str(torch.version.cuda).split('.')[0]}" if device == "cuda" else STAND_IN


# What the emulator has in its place; tests load it.
STAND_IN = "libfusedseq_stand_in.so"


def _directly() -> bool:
    return config.settings.cuda_products == "direct"


def _library(x: Tensor, stream: int | None) -> tuple[tuple[str, int, int | None, int, int], Tensor]:
    """The library's name, the device, the stream and workspace for a call past torch, which the second result keeps."""
    memory = torch.empty(LIBRARY_WORKSPACE + WORKSPACE_UNIT, dtype=torch.uint8, device=x.device)
    return (_library_name(x.device.type), x.device.index or 0, stream, aligned(memory), LIBRARY_WORKSPACE), memory


def _matrix(t: Tensor) -> tuple[Tensor, tuple[int, int, bool]]:
    """Address, distance of rows and whether it is the transpose that lies in rows; and the tensor that it is of."""
    (rows, columns), (down, along) = t.shape, t.stride()
    if (along == 1 or columns == 1) and (down >= columns or rows == 1):
        return t, (t.data_ptr(), max(down, columns), False)
    if (down == 1 or rows == 1) and (along >= rows or columns == 1):
        return t, (t.data_ptr(), max(along, rows), True)
    return _matrix(t.contiguous())


def _direct(core: Any, a: Tensor, b: Tensor, dtype: torch.dtype, stream: int | None) -> Tensor | None:
    """a b by a call of the library past torch, whose way to a product of halves in float32 takes 110 us on the host."""
    sizes = (a.shape[0], b.shape[1], a.shape[1])
    if min(sizes) < 1 or max(sizes) >= 2**31:
        return None
    (a, left), (b, right) = _matrix(a), _matrix(b)
    if max(left[1], right[1]) >= 2**31:
        return None
    library, _kept = _library(a, stream)
    made = a.new_empty(sizes[:2], dtype=dtype)
    codes = tensors.DTYPES[a.dtype], tensors.DTYPES[dtype]
    core.library_product(library, sizes, left, right, made.data_ptr(), *codes, False)
    return made


def product_of(
    a: Tensor, b: Tensor, dtype: torch.dtype, core: Any = None, stream: int | None = None
) -> Tensor:  # [M, K] x [K, N]
    """a b in `dtype`, summed in float32 at least and rounded once; with `core` and the stream, past torch if asked."""
    if a.dtype not in HALF:
        return a @ b
    if core is not None and dtype == torch.float32 and _directly():
        made = _direct(core, a, b, dtype, stream)
        if made is not None:
            return made
    if a.is_cuda and a.dtype == dtype:
        return a @ b
    if a.is_cuda and _wide_products():
        return torch.mm(a, b, out_dtype=dtype)
    return (a.float() @ b.float()).to(dtype)


def products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:  # [D, M, K] x [D, K, N]
    if a.dtype in HALF and a.is_cuda and _wide_products():
        return torch.bmm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def product_of_steps(
    core: Any, cell: str, chosen: Any, workspace: Tensor, weights: list[Tensor], B: int, backward: bool, rounded: bool,
    stream: int | None,
) -> tuple[Any, list[Tensor]]:  # fmt: skip
    """Tier `step`: what forms the recurrent product of a turn, and what must outlive the scan; None if the kernel does.

    weights: W_hh [G*H, R] of each direction.
    """
    if core.tiers[chosen.tier] != "step" or cell == "gru_reset_before":
        return None, []
    D, K = len(weights), weights[0].shape[0 if backward else 1]
    first = aligned(workspace) - workspace.data_ptr()
    factors = [w if backward else w.t() for w in weights]
    S = compute(weights[0].dtype)
    if _directly() and weights[0].numel() >= DIRECTLY:
        library, kept = _library(workspace, stream)
        N = factors[0].shape[1]
        into = workspace.new_empty((D, B, N), dtype=S)
        fed = tuple(workspace.data_ptr() + first + at for at in (0, chosen.second_fed))
        steps = core.LibrarySteps(library, fed, tuple(_matrix(f)[1] for f in factors), N, K, into.data_ptr())
        return steps, [kept, into]
    single = weights[0].dtype == torch.float32
    if weights[0].numel() < THROUGH_TORCH:
        return None, []
    if single and not rounded and weights[0].is_cuda and tensors.matmul_tf32():
        return None, []  # torch would round what must not be rounded
    size = D * B * K * weights[0].element_size()
    states = [
        workspace[first + at : first + at + size].view(weights[0].dtype).view(D, B, K) for at in (0, chosen.second_fed)
    ]
    factor = factors[0] if D == 1 else torch.stack(factors)
    kept_product: list[Tensor] = []

    def product(turn: int) -> int:
        state = states[turn & 1]
        made = product_of(state[0], factor, S) if D == 1 else products(state, factor, S)
        kept_product[:] = [made]  # until the next launch is enqueued
        return made.data_ptr()

    return product, []


def aligned(memory: Tensor) -> int:
    return -(-memory.data_ptr() // WORKSPACE_UNIT) * WORKSPACE_UNIT
