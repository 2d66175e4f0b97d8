"""Attention on the compiled core for CPUs: tensors to addresses and strides; part of the backend `cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedseq.reference.attention import Problem, threshold

_core: Any
try:
    from fusedseq import _cpu as _core
except ImportError:
    _core = None

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FAR = 2**40  # no window reaches further, and sums with it do not overflow
_threads = torch.get_num_threads
_empty_like = torch.empty_like


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous()


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    sb, sh, sn, _ = t.stride()
    return t.data_ptr(), sb, sh, sn


def _table(t: Tensor) -> Tensor:
    """One that is dense along the keys, or the same for all of them."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 or t.stride(3) == 0 else t.contiguous()


def _broadcast(t: Tensor | None) -> tuple[int, int, int, int, int] | None:
    if t is None:
        return None
    sb, sh, sl, ss = (0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), sb, sh, sl, ss


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class _Call:
    """A problem as the core takes it; keeps what had to be copied alive."""

    __slots__ = ("alibi", "bias", "compute", "dense", "global_keys", "k", "numbers", "p", "q", "sinks", "sizes", "v")

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.q, self.k, self.v = _dense(p.q), _dense(p.k), _dense(p.v)
        self.compute = torch.float64 if p.q.dtype == torch.float64 else torch.float32
        self.bias = self.dense = self.alibi = self.sinks = self.global_keys = None
        bias_dtype = 0
        if p.bias is not None:
            self.bias = _table(p.bias.double() if p.q.dtype == torch.float64 else p.bias)
            bias_dtype = _DTYPES[self.bias.dtype]
        if p.dense is not None:
            self.dense = _table(p.dense)
        if p.alibi_slopes is not None:
            self.alibi = p.alibi_slopes.to(self.compute).contiguous()
        if p.sinks is not None:
            self.sinks = p.sinks.to(self.compute).contiguous()
        if p.global_keys is not None:
            self.global_keys = p.global_keys.contiguous()
        B, Hq, L, E = self.q.shape
        _, Hkv, S, Ev = self.v.shape
        self.sizes = (B, Hq, Hkv, L, S, E, Ev, 0 if p.cu_q is None else p.cu_q.shape[0] - 1)
        limit, keep_scale, seed = None, 1.0, 0
        if p.dropout_p:
            assert p.seed is not None
            limit, seed = threshold(p.dropout_p), int(p.seed) & 0xFFFFFFFFFFFFFFFF
            keep_scale = 0.0 if p.dropout_p >= 1 else 1 / (1 - p.dropout_p)
        self.numbers = (
            _DTYPES[p.q.dtype], bias_dtype, p.causal, min(p.left, _FAR), min(p.right, _FAR), p.scale, p.softcap, limit,
            keep_scale, seed,
        )  # fmt: skip

    def tensors(self, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
        p, shared = self.p, self.global_keys
        return (
            _heads(self.q), _heads(self.k), _heads(self.v), _heads(out), lse.data_ptr(), _broadcast(self.bias),
            _pointer(self.alibi), _pointer(self.sinks), _broadcast(self.dense), _pointer(p.key_lengths),
            _pointer(p.cu_q), _pointer(p.cu_k), _pointer(shared),
            0 if shared is None or shared.shape[0] == 1 else shared.stride(0),
        )  # fmt: skip


def _like(t: Tensor, width: int) -> Tensor:
    """An unwritten [B, H, N, width] that lies in memory as t does."""
    if width == t.shape[3] and t.stride(3) == 1:
        return _empty_like(t)
    B, H, N, _ = t.shape
    if H > 1 and N > 1 and t.stride(1) < t.stride(2):
        return t.new_empty((B, N, H, width)).transpose(1, 2)
    return t.new_empty((B, H, N, width))


def attention_forward(p: Problem) -> tuple[Tensor, Tensor]:
    call = _Call(p)
    out = _like(p.q, p.v.shape[3])
    lse = p.q.new_empty(p.q.shape[:3], dtype=call.compute)
    if p.cu_q is not None:  # rows behind the last sequence are not visited
        out.zero_()
        lse.copy_(lse.new_tensor(float("-inf")) if call.sinks is None else call.sinks.view(1, -1, 1))
    _core.attention_forward(_threads(), call.sizes, call.tensors(out, lse), call.numbers)
    return out, lse


class PlainAttention:
    """q, k and v alone, for calls that repeat: sizes, dtype and numbers are those of the problem given."""

    __slots__ = ("_backward", "_lse", "_out", "_run")

    def __init__(self, p: Problem) -> None:
        call = _Call(p)
        self._run = _core.PlainAttention(call.sizes, call.numbers)
        self._backward = self._run.backward
        # What results are made like; of one element, however large they are.
        self._out = p.v.new_empty(1).expand(*p.q.shape[:3], p.v.shape[3])
        self._lse = p.v.new_empty(1, dtype=call.compute).expand(p.q.shape[:3])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `attention_forward` gives, or None for strides that it would copy."""
        at = q.stride()
        transposed = at[1] < at[2] and q.shape[1] > 1 and q.shape[2] > 1
        out = _like(q, v.shape[3]) if transposed else _empty_like(self._out)
        lse = _empty_like(self._lse)
        done = self._run(
            _threads(), q.data_ptr(), at, k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), out.data_ptr(),
            out.stride(), lse.data_ptr(),
        )  # fmt: skip
        return (out, lse) if done else None

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What `attention_backward` gives for all three, or None as above."""
        dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
        done = self._backward(
            _threads(), q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), out.data_ptr(),
            out.stride(), lse.data_ptr(), dout.data_ptr(), dout.stride(), dq.data_ptr(), dq.stride(), dk.data_ptr(),
            dk.stride(), dv.data_ptr(), dv.stride(),
        )  # fmt: skip
        return (dq, dk, dv) if done else None


def plain_attention(p: Problem) -> PlainAttention | None:
    """One for calls like this one; None if it has more than q, k and v, or nothing in them."""
    if any(t is not None for t in p.tensors()[3:]) or any(t.numel() == 0 for t in (p.q, p.k, p.v)):
        return None
    return PlainAttention(p)


def attention_backward(
    p: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],  # of q, k, v, bias, alibi_slopes, sinks
) -> tuple[Tensor | None, ...]:
    call = _Call(p)
    out, lse = _dense(out), lse.contiguous()
    dout = torch.zeros_like(out) if dout is None else _dense(dout.to(out.dtype))
    dlse = None if dlse is None else dlse.to(call.compute).contiguous()
    part = p.cu_q is not None or p.key_lengths is not None  # then rows and keys beyond are not visited
    dq = _like(p.q, p.q.shape[3]) if needs[0] else None
    dk = dv = None
    if needs[1] or needs[2]:
        dk, dv = _like(p.k, p.k.shape[3]), _like(p.v, p.v.shape[3])
    if part:
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()
    dbias = p.bias.new_empty(p.bias.shape, dtype=call.compute) if needs[3] and p.bias is not None else None
    dalibi = call.alibi.new_empty(call.alibi.shape) if needs[4] and call.alibi is not None else None
    dsinks = call.sinks.new_empty(call.sinks.shape) if needs[5] and call.sinks is not None else None
    _core.attention_backward(
        _threads(), call.sizes, call.tensors(out, lse), call.numbers,
        (
            _heads(dout), _pointer(dlse), None if dq is None else _heads(dq), None if dk is None else _heads(dk),
            None if dv is None else _heads(dv), _broadcast(dbias), _pointer(dalibi), _pointer(dsinks),
        ),
    )  # fmt: skip
    grads = (dq, dk if needs[1] else None, dv if needs[2] else None, dbias, dalibi, dsinks)
    return tuple(
        None if g is None or t is None else g if g.dtype == t.dtype else g.to(t.dtype)
        for g, t in zip(grads, p.inputs(), strict=True)
    )
