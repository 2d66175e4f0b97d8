"""Attention on the Triton kernels: tensors to pointers, strides and features; part of the backend `triton`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedseq.backends.tensors import listed
from fusedseq.backends.triton_device import capability, multiprocessors, on_device
from fusedseq.backends.triton_strides import broadcast, dense, describable, describe, like, strides
from fusedseq.backends.triton_tuning import choose
from fusedseq.kernels import attention_mask as bits
from fusedseq.kernels.attention_backward import attention_dkv_kernel, attention_dq_kernel
from fusedseq.kernels.attention_bias import attention_dbias_kernel
from fusedseq.kernels.attention_config import Tile, neighbours, sums, tile, tiled, width_of
from fusedseq.kernels.attention_decode import attention_merge_kernel
from fusedseq.kernels.attention_far import attention_far_kernel
from fusedseq.kernels.attention_forward import attention_forward_kernel
from fusedseq.kernels.attention_gradients import attention_delta_kernel
from fusedseq.kernels.runtime import dot_precision, dot_type
from fusedseq.reference.attention import BOTTOM_RIGHT, Problem, threshold

if TYPE_CHECKING:
    from fusedseq.registry import AttentionCall

WIDEST = 256
LONGEST = 2**29  # positions and windows are 32-bit numbers, and so are their sums
# Rows of a pair up to which its keys are cut into parts, the keys from which on, and how many parts at most.
FEW_ROWS = 64
MANY_KEYS = 512
PARTS = 64
FAR_TILES = 32  # programs of a pair that share its tiles of global keys
L2_BYTES = 16 << 20  # of keys and values that neighbouring programs share


def supports(call: AttentionCall) -> str | None:
    if max(call.E, call.Ev) > WIDEST:
        return f"heads may have up to {WIDEST} elements, these have {max(call.E, call.Ev)}"
    if max(call.L, call.S) >= LONGEST:
        return f"sequences may have up to {LONGEST} positions, these have {max(call.L, call.S)}"
    return None


class _Call:
    """A problem as the kernels take it."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        q = p.q
        self.q, self.k, self.v = dense(q), dense(p.k), dense(p.v)
        self.B, self.Hq, self.L, self.E = q.shape
        _, self.Hkv, self.S, self.Ev = p.v.shape
        self.G = self.Hq // max(self.Hkv, 1)
        self.BE, self.BV = width_of(self.E), width_of(self.Ev)
        self.bias = p.bias
        self.dense = None if p.dense is None else p.dense.view(torch.uint8)
        self.slopes = None if p.alibi_slopes is None else p.alibi_slopes.float().contiguous()
        self.sinks = None if p.sinks is None else p.sinks.float().contiguous()
        self.left = p.left if 0 <= p.left < self.L + self.S else -1
        self.right = p.right if 0 <= p.right < self.L + self.S else -1
        self.keep_scale = 0.0 if p.dropout_p >= 1 else 1 / (1 - p.dropout_p)
        self.limit = threshold(p.dropout_p)
        self.seed = None if p.seed is None else p.seed.to(q.device, torch.int64)
        self.features = self._features()
        self.positions = self.ranks = None
        if self.features & bits.GLOBAL.value:
            assert p.global_keys is not None
            self.positions, self.ranks = listed(p.global_keys)

    def _features(self) -> int:
        p = self.p
        found = (
            (bits.LEFT, self.left >= 0),
            (bits.RIGHT, self.right >= 0),
            (bits.CAUSAL, p.causal != 0),
            (bits.BOTTOM_RIGHT, p.causal == BOTTOM_RIGHT),
            (bits.LENGTHS, p.key_lengths is not None),
            (bits.PACKED, p.cu_q is not None),
            (bits.GLOBAL, p.global_keys is not None and (self.left >= 0 or (self.right >= 0 and not p.causal))),
            (bits.DENSE, p.dense is not None),
            (bits.BIAS, p.bias is not None),
            (bits.ALIBI, p.alibi_slopes is not None),
            (bits.SOFTCAP, p.softcap != 0),
            (bits.SINKS, p.sinks is not None),
            (bits.DROPOUT, p.dropout_p != 0),
            (bits.GROUPED, self.G > 1),
            (bits.PADDED_E, self.E != self.BE),
            (bits.PADDED_EV, self.Ev != self.BV),
            (bits.EXACT, p.q.dtype == torch.float32),
        )
        features = sum(bit.value for bit, there in found if there)
        if not features & (bits.ALTERED.value | bits.EXACT.value) and p.scale > 0:
            features |= bits.FOLDED.value
        return features

    @property
    def scale(self) -> float:
        plain = not self.features & (bits.ALTERED.value | bits.EXACT.value)
        return self.p.scale * bits.LOG2E.value if plain else self.p.scale

    def tiles(self, cu: Tensor | None, factor: int, size: int, block: int) -> tuple[int, Tensor | None, Tensor | None]:
        """How many tiles of `block` out of `size` items (or the sequences of `cu`, `factor` items for each position):
        their number, and for packed sequences that of each tile's sequence and of each sequence's first tile."""
        if cu is None:
            return -(-size * factor // block), None, None
        N = cu.shape[0] - 1
        if N == 0:
            return 0, None, None
        counts = ((cu[1:] - cu[:-1]) * factor + block - 1) // block
        firsts = torch.zeros(N + 1, dtype=torch.int64, device=cu.device)
        torch.cumsum(counts, 0, out=firsts[1:])
        number = size * factor // block + N  # at least as many as there are
        index = torch.arange(number, device=cu.device)
        return number, torch.searchsorted(firsts[1:], index, right=True).clamp_(max=N - 1).int(), firsts.int()

    def places(self) -> tuple[Any, ...]:
        p = self.p
        return p.key_lengths, p.cu_q, p.cu_k, self.positions, self.ranks

    def far_strides(self) -> tuple[int, int]:
        """From one batch row to the next in `positions` and `ranks`."""
        if self.positions is None or self.ranks is None or self.positions.shape[0] == 1:
            return 0, 0
        return self.positions.stride(0), self.ranks.stride(0)

    def pairs(self) -> int:
        return self.Hkv if self.p.cu_q is not None else self.B * self.Hkv

    def section(self) -> int:
        held = self.S * (self.E + self.Ev) * self.q.element_size()
        return max(1, min(self.pairs(), L2_BYTES // max(held, 1)))

    def tiled(self, kernel: str, features: int) -> int:
        """The feature of keys and values that come through descriptors, where the kernel and their layout let them."""
        taken = tiled(kernel, self.q.dtype, capability(self.q), features, self.L * self.G)
        return bits.TILED.value if taken and describable(self.k) and describable(self.v) else 0

    def descriptors(self, features: int, BN: int) -> tuple[Any, Any]:
        """Of keys and values, in tiles of BN."""
        if not features & bits.TILED.value:
            return None, None
        return describe(self.k, BN, self.BE), describe(self.v, BN, self.BV)

    def launch(self, kernel: str, features: int, run: Callable[[Tile], None], again: bool = True) -> None:
        """Run a kernel on the tile that is shipped for it, or, if asked for and if it may run `again`, the fastest."""
        width, dtype = max(self.BE, self.BV), self.q.dtype
        chosen = shipped = tile(kernel, width, dtype, capability(self.q), features, self.L * self.G)
        if again:
            # Without the batch, which must not change a result.
            sizes = (self.G, self.L.bit_length(), self.S.bit_length(), self.BE, self.BV)
            key = (kernel, features, dtype, dot_precision(dtype), *sizes)
            chosen = choose(key, shipped, lambda: neighbours(shipped, kernel, features), run, self.q)
        run(chosen)


def attention_forward(p: Problem) -> tuple[Tensor, Tensor]:
    call = _Call(p)
    out = like(p.q, call.Ev)
    lse = p.q.new_empty(p.q.shape[:3], dtype=torch.float32)
    if p.cu_q is not None:  # rows behind the last sequence are not visited
        out.zero_()
        lse.copy_(lse.new_tensor(float("-inf")) if call.sinks is None else call.sinks.view(1, -1, 1))
    if lse.numel() == 0:
        return out, lse
    with on_device(p.q):
        parts, size = _parts(call)
        if parts == 1:
            _forward(call, out, lse, None, 1, call.S)
            return out, lse
        held = p.q.new_empty((parts, *p.q.shape[:3], call.Ev), dtype=torch.float32)
        tops, totals = (p.q.new_empty((parts, *p.q.shape[:3]), dtype=torch.float32) for _ in range(2))
        _forward(call, held, tops, totals, parts, size)
        rows = lse.numel()
        attention_merge_kernel[(rows,)](
            held, tops, totals, out, lse, call.sinks, *strides(out), rows, call.Hq, call.L, call.Ev, call.keep_scale,
            parts, call.features, call.BV, num_warps=1,
        )  # fmt: skip
        return out, lse


def _parts(call: _Call) -> tuple[int, int]:
    """How many parts the keys of few rows are cut into, and the size of one. Depends on neither the batch nor the GPU,
    so that a row's result does not."""
    if call.L * call.G > FEW_ROWS or call.S < MANY_KEYS or call.p.cu_q is not None:
        return 1, call.S
    size = 256
    while size * PARTS < call.S:
        size *= 2
    return -(-call.S // size) + bool(call.features & bits.GLOBAL.value), size


def _forward(call: _Call, out: Tensor, lse: Tensor, totals: Tensor | None, parts: int, size: int) -> None:
    p, features = call.p, call.features | (bits.SPLIT.value if totals is not None else 0)
    pairs = call.pairs()
    features |= call.tiled("forward", features)

    def run(chosen: Tile) -> None:
        tiles, tile_sequence, tile_first = call.tiles(p.cu_q, call.G, call.L, chosen.BM)
        if tiles == 0:
            return
        programs = min(tiles * pairs, multiprocessors(call.q)) if chosen.dealt else tiles * pairs
        attention_forward_kernel[(programs, parts)](
            call.q, call.k, call.v, out, lse, totals, call.bias, call.dense, call.slopes, call.sinks, *call.places(),
            tile_sequence, tile_first, call.seed, *call.descriptors(features, chosen.BN),
            *strides(call.q), *strides(call.k), *strides(call.v),
            *strides(out[0] if totals is not None else out), *broadcast(call.bias),
            *broadcast(call.dense),
            *call.far_strides(), call.B, call.Hq, call.G, call.L, call.S, call.E, call.Ev, call.left, call.right,
            call.scale, p.softcap, call.limit, call.keep_scale, tiles, pairs, call.section(), size,
            features | (bits.DEALT.value if chosen.dealt else 0), chosen.BM, chosen.BN, call.BE, call.BV,
            dot_type(p.q.dtype), dot_precision(p.q.dtype),
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip

    call.launch("forward", features, run)


class _Backward:
    """What the kernels of one backward pass share."""

    def __init__(self, call: _Call, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> None:
        self.call, self.dout = call, dout
        self.ready, self.delta = torch.empty_like(lse), torch.empty_like(lse)
        rows, block = lse.numel(), 32
        attention_delta_kernel[(-(-rows // block),)](
            out, dout, lse, dlse, self.ready, self.delta, *strides(out), *strides(dout), rows, call.Hq, call.L,
            call.Ev, call.features, block, call.BV, dlse is not None, num_warps=4,
        )  # fmt: skip

    def sources(self) -> tuple[Any, ...]:
        return self.call.q, self.call.k, self.call.v, self.dout, self.ready, self.delta

    def strides(self) -> tuple[int, ...]:
        call = self.call
        return *strides(call.q), *strides(call.k), *strides(call.v), *strides(self.dout)

    def tables(self) -> tuple[Any, ...]:
        return self.call.bias, self.call.dense, self.call.slopes

    def table_strides(self) -> tuple[int, ...]:
        return *broadcast(self.call.bias), *broadcast(self.call.dense)

    def sizes(self) -> tuple[Any, ...]:
        call = self.call
        return (
            call.Hq, call.G, call.L, call.S, call.E, call.Ev, call.left, call.right, call.scale, call.p.scale,
            call.p.softcap, call.limit, call.keep_scale,
        )  # fmt: skip

    def constants(self, chosen: Tile, features: int) -> tuple[Any, ...]:
        call, dtype = self.call, self.call.q.dtype
        return features, chosen.BM, chosen.BN, call.BE, call.BV, dot_type(dtype), dot_precision(dtype)

    def queries(self) -> tuple[Tensor, Tensor | None]:
        """dq, and the gradient of the slopes."""
        call, p = self.call, self.call.p
        dq = like(p.q, call.E)
        slopes = None if call.slopes is None else torch.zeros_like(self.delta)
        if p.cu_q is not None:  # rows behind the last sequence are not visited
            dq.zero_()
        pairs = call.pairs()
        features = call.features | call.tiled("dq", call.features)

        def run(chosen: Tile) -> None:
            tiles, tile_sequence, tile_first = call.tiles(p.cu_q, call.G, call.L, chosen.BM)
            if tiles == 0:
                return
            attention_dq_kernel[(tiles * pairs,)](
                *self.sources(), dq, slopes, *self.tables(), *call.places(), tile_sequence, tile_first, call.seed,
                *call.descriptors(features, chosen.BN), *self.strides(), *strides(dq),
                *self.table_strides(), *call.far_strides(), *self.sizes(), tiles, pairs, call.section(),
                *self.constants(chosen, features), num_warps=chosen.warps, num_stages=chosen.stages,
            )  # fmt: skip

        call.launch("dq", features, run)
        return dq, None if slopes is None else -slopes.sum((0, 2))

    def keys(self) -> tuple[Tensor, Tensor]:
        """dk and dv; where two kernels add to them they are kept in float32 in between."""
        call, p = self.call, self.call.p
        two = bool(call.features & bits.GLOBAL.value)
        dk, dv = (like(t, t.shape[3], torch.float32 if two else None) for t in (p.k, p.v))
        if p.cu_k is not None:
            dk.zero_()
            dv.zero_()
        pairs = call.pairs()
        if call.S == 0 or pairs == 0:
            return dk, dv
        shared = (*self.strides(), *strides(dk), *strides(dv), *self.table_strides(), *call.far_strides(),
                  *self.sizes())  # fmt: skip
        for which in sums(max(call.BE, call.BV)):

            def near(chosen: Tile, features: int = call.features | which) -> None:
                tiles, tile_sequence, tile_first = call.tiles(p.cu_k, 1, call.S, chosen.BN)
                if tiles == 0:
                    return
                attention_dkv_kernel[(tiles * pairs,)](
                    *self.sources(), dk, dv, *self.tables(), *call.places(), tile_sequence, tile_first, call.seed,
                    *shared, tiles, pairs, call.section(), *self.constants(chosen, features), chosen.edges,
                    num_warps=chosen.warps, num_stages=chosen.stages,
                )  # fmt: skip

            def far(chosen: Tile, features: int = call.features | which) -> None:
                sequences = call.B if p.cu_k is None else p.cu_k.shape[0] - 1
                tiles = min(FAR_TILES, -(-call.S // chosen.BN))
                if sequences == 0:
                    return
                attention_far_kernel[(sequences * call.Hkv * tiles,)](
                    *self.sources(), dk, dv, *self.tables(), *call.places(), call.seed, *shared, tiles,
                    *self.constants(chosen, features), num_warps=chosen.warps, num_stages=chosen.stages,
                )  # fmt: skip

            call.launch("dkv", call.features | which, near)
            if two:
                call.launch("far", call.features | which, far, again=False)
        return dk, dv

    def bias(self) -> Tensor:
        call, p = self.call, self.call.p
        assert p.bias is not None
        dbias = p.bias.new_empty(p.bias.shape, dtype=torch.float32)
        over = tuple(size == 1 for size in p.bias.shape)
        table, stride = p.global_keys, 0
        if table is not None:
            table = table.view(torch.uint8).contiguous()
            stride = table.stride(0) if table.shape[0] > 1 else 0
        sequences = call.B if p.cu_q is None else p.cu_q.shape[0] - 1
        sizes = self.sizes()

        def run(chosen: Tile) -> None:
            row_tiles, key_tiles = -(-call.L // chosen.BM), -(-call.S // chosen.BN)
            jobs = 1
            for summed, number in zip(over, (call.B, call.Hq, row_tiles, key_tiles), strict=True):
                jobs *= 1 if summed else number
            if jobs == 0:
                return
            attention_dbias_kernel[(jobs,)](
                *self.sources(), dbias, *self.tables(), p.key_lengths, p.cu_q, p.cu_k, table, call.ranks, call.seed,
                *self.strides(), *self.table_strides(), stride, call.far_strides()[1], sequences, *sizes[:9],
                *sizes[10:], row_tiles, key_tiles, *over, *self.constants(chosen, call.features),
                num_warps=chosen.warps, num_stages=chosen.stages,
            )  # fmt: skip

        call.launch("dbias", call.features, run)
        return dbias

    def sinks(self, lse: Tensor) -> Tensor:
        sinks = self.call.sinks
        assert sinks is not None
        weights = (sinks[:, None] - lse.masked_fill(lse == float("-inf"), float("inf"))).exp()
        return -(weights * self.delta).sum((0, 2))


def attention_backward(
    p: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],  # of q, k, v, bias, alibi_slopes, sinks
) -> tuple[Tensor | None, ...]:
    if lse.numel() == 0:
        return tuple(
            torch.zeros_like(t) if need and t is not None else None for t, need in zip(p.inputs(), needs, strict=True)
        )
    call = _Call(p)
    out, lse = dense(out), lse.contiguous()
    dout = torch.zeros_like(out) if dout is None else dense(dout.to(out.dtype))
    dlse = None if dlse is None else dlse.float().contiguous()
    dq = dk = dv = dbias = dalibi = dsinks = None
    with on_device(p.q):
        work = _Backward(call, out, lse, dout, dlse)
        if needs[0] or needs[4]:
            dq, dalibi = work.queries()
        if needs[1] or needs[2]:
            dk, dv = work.keys()
        if needs[3] and p.bias is not None:
            dbias = work.bias()
        if needs[5] and p.sinks is not None:
            dsinks = work.sinks(lse)
    grads = (dq, dk, dv, dbias, dalibi, dsinks)
    return tuple(
        g.to(t.dtype) if need and g is not None and t is not None else None
        for g, t, need in zip(grads, p.inputs(), needs, strict=True)
    )
