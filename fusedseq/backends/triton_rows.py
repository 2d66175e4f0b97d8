"""Layer normalisation, bias and activation on the Triton kernels; part of the backend `triton`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedseq.backends.triton_device import on_device
from fusedseq.backends.triton_dropout import dropout_arguments
from fusedseq.backends.triton_tuning import Block, choose
from fusedseq.kernels import bias_activation as bias_activation_kernels
from fusedseq.kernels import layer_norm as layer_norm_kernels
from fusedseq.reference import bias_activation, layer_norm

if TYPE_CHECKING:
    from fusedseq.registry import RowCall

# The longest row that one program normalises without spilling registers, and the longest that is no multiple of 16.
WIDEST = 4096
WIDEST_ODD = 2048
_TILE = 2048  # elements of a tile, unless a row has more
_SHARES = 256  # programs whose sums of a weight gradient are added up afterwards; fixed, as it settles the order


def supports(call: RowCall) -> str | None:
    if call.op == "layer_norm" and call.d > (WIDEST_ODD if call.d % 16 else WIDEST):
        return (
            f"it normalises rows of up to {WIDEST} elements, beyond {WIDEST_ODD} only multiples of 16; "
            f"these have {call.d}"
        )
    return None


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _columns(d: int) -> int:
    """A power of two that holds a row, in whole blocks of dropout's."""
    return max(64, 1 << (d - 1).bit_length())


def _block(d: int, most: int | None = None) -> Block:
    """The tile that ships for rows of d elements, whole or in pieces of up to `most`."""
    BN = _columns(d) if most is None else min(_columns(d), most)
    return Block(max(1, min(16, _TILE // BN)), BN, max(4, min(32, BN // 256)) if most is None else 4)


def _shares(rows: int, BM: int) -> tuple[int, int]:
    """How many programs share the rows, and how many tiles each takes."""
    tiles = -(-rows // BM)
    each = -(-tiles // _SHARES)
    return -(-tiles // each), each


def _rows(x: Tensor) -> tuple[int, int]:
    d = x.shape[-1]
    return (x.numel() // d if d else 0), d


def _there(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(t is not None for t in tensors)


def _added(shares: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if shares is None else shares.sum(0).to(dtype)


def layer_norm_forward(p: layer_norm.Problem) -> tuple[Tensor, Tensor | None]:
    x, residual, weight, bias = (_dense(t) for t in p[:4])
    assert x is not None
    out, total = torch.empty_like(x), torch.empty_like(x) if p.return_sum else None
    rows, d = _rows(x)
    if rows == 0:
        return out, total
    seed, limit, scale = dropout_arguments(p.dropout_p, p.seed, x.device)

    def run(block: Block) -> None:
        layer_norm_kernels.forward[(-(-rows // block.BM),)](
            x, residual, weight, bias, seed, out, total, rows, d, p.eps, limit, scale, BM=block.BM, BN=block.BN,
            num_warps=block.warps,
        )  # fmt: skip

    with on_device(x):
        shipped = _block(d)
        key = ("layer_norm", "forward", x.dtype, d, *_there(residual, weight, bias, seed, total))
        run(choose(key, shipped, lambda: shipped.others(whole=True), run, x))
    return out, total


def layer_norm_backward(
    p: layer_norm.Problem, upstream: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, weight and bias. Without dropout those of x and residual are one tensor."""
    x, residual, weight = (_dense(t) for t in p[:3])
    assert x is not None
    dout, dtotal = (_dense(t) for t in upstream)
    rows, d = _rows(x)
    dx = torch.empty_like(x) if needs[0] or (needs[1] and not p.dropout_p) else None
    dresidual = torch.empty_like(x) if needs[1] and p.dropout_p else None
    if rows == 0:
        dweight, dbias = (x.new_zeros((1, d), dtype=torch.float32) if need else None for need in needs[2:])
    else:
        seed, limit, scale = dropout_arguments(p.dropout_p, p.seed, x.device)

        def run(block: Block) -> list[Tensor | None]:
            programs, each = _shares(rows, block.BM)
            sums = [x.new_empty((programs, d), dtype=torch.float32) if need else None for need in needs[2:]]
            layer_norm_kernels.backward[(programs,)](
                x, residual, weight, seed, dout, dtotal, dx, dresidual, *sums, rows, d, p.eps, limit, scale, each,
                BM=block.BM, BN=block.BN, num_warps=block.warps,
            )  # fmt: skip
            return sums

        with on_device(x):
            shipped = _block(d)
            key = ("layer_norm", "backward", x.dtype, d, *needs, *_there(residual, weight, seed, dout, dtotal))
            dweight, dbias = run(choose(key, shipped, lambda: shipped.others(whole=True), run, x))
    return (
        dx if needs[0] else None,
        (dresidual if p.dropout_p else dx) if needs[1] else None,
        _added(dweight, x.dtype),
        _added(dbias, x.dtype),
    )


def bias_activation_forward(p: bias_activation.Problem, out: Tensor | None = None) -> tuple[Tensor]:
    """`out`, if given, is written to where possible; it may be x itself."""
    x, bias, residual = (_dense(t) for t in p[:3])
    assert x is not None
    out = torch.empty_like(x) if out is None or not out.is_contiguous() else out
    rows, d = _rows(x)
    if rows == 0:
        return (out,)
    seed, limit, scale = dropout_arguments(p.dropout_p, p.seed, x.device)

    def run(block: Block, out: Tensor) -> None:
        bias_activation_kernels.forward[(-(-rows // block.BM), -(-d // block.BN))](
            x, bias, residual, seed, out, rows, d, limit, scale, NAME=p.activation, BM=block.BM, BN=block.BN,
            num_warps=block.warps,
        )  # fmt: skip

    with on_device(x):
        shipped = _block(d, 512)
        key = ("bias_activation", "forward", p.activation, x.dtype, d, *_there(bias, residual, seed))
        # `out` may be x, which a trial must leave as it is.
        block = choose(key, shipped, shipped.others, lambda block: run(block, torch.empty_like(x)), x)
        run(block, out)
    return (out,)


def bias_activation_backward(
    p: bias_activation.Problem, upstream: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias and residual; the last is the upstream one itself."""
    x, bias, dout = _dense(p.x), _dense(p.bias), _dense(upstream[0])
    assert x is not None and dout is not None
    rows, d = _rows(x)
    dx, dbias = torch.empty_like(x) if needs[0] else None, None
    if rows == 0:
        dbias = x.new_zeros((1, d), dtype=torch.float32) if needs[1] else None
    elif needs[0] or needs[1]:
        seed, limit, scale = dropout_arguments(p.dropout_p, p.seed, x.device)

        def run(block: Block) -> Tensor | None:
            programs, each = _shares(rows, block.BM)
            sums = x.new_empty((programs, d), dtype=torch.float32) if needs[1] else None
            bias_activation_kernels.backward[(programs, -(-d // block.BN))](
                x, bias, seed, dout, dx, sums, rows, d, limit, scale, each, NAME=p.activation, BM=block.BM,
                BN=block.BN, num_warps=block.warps,
            )  # fmt: skip
            return sums

        with on_device(x):
            shipped = _block(d, 512)
            key = ("bias_activation", "backward", p.activation, x.dtype, d, *needs, *_there(bias, seed))
            dbias = run(choose(key, shipped, shipped.others, run, x))
    return dx, _added(dbias, x.dtype), dout if needs[2] else None
