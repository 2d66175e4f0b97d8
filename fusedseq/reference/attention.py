"""Scaled dot-product attention with structured masks, written out in full: O(L S) memory, any floating dtype.

The core is Vaswani et al. 2017 (arXiv:1706.03762, equation 1); `lse` and the backward pass from it are those of Dao et
al. 2022 (arXiv:2205.14135, algorithm 4). ALiBi: Press et al. 2022 (arXiv:2108.12409, section 3). Softcap: Gemma 2
(arXiv:2408.00118, section 2). Sinks: a logit per head that only the denominator sees (Xiao et al. 2023,
arXiv:2309.17453). Dropout: Philox 4x32-10, Salmon et al. 2011 (doi:10.1145/2063384.2063405).

Notation: B batch, Hq / Hkv heads of queries / keys (G = Hq / Hkv), L queries, S keys, E / Ev sizes of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

TOP_LEFT, BOTTOM_RIGHT = 1, 2  # values of `causal`; 0: not causal


class Problem(NamedTuple):
    """One call of attention, validated; what backends are given."""

    q: Tensor  # [B, Hq, L, E]
    k: Tensor  # [B, Hkv, S, E]
    v: Tensor  # [B, Hkv, S, Ev]
    bias: Tensor | None = None  # [1|B, 1|Hq, 1|L, 1|S], added to the logits
    alibi_slopes: Tensor | None = None  # [Hq]
    sinks: Tensor | None = None  # [Hq]
    dense: Tensor | None = None  # bool [1|B, 1|Hq, 1|L, 1|S], true takes part
    key_lengths: Tensor | None = None  # [B] int64
    cu_q: Tensor | None = None  # [N+1] int64, then B = 1
    cu_k: Tensor | None = None  # [N+1] int64
    global_keys: Tensor | None = None  # bool [1|B, S]
    seed: Tensor | None = None  # [] int64, given if dropout_p > 0
    causal: int = 0
    left: int = -1  # keys to the left of the diagonal that a query sees; -1: all
    right: int = -1
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0

    def inputs(self) -> tuple[Tensor | None, ...]:
        """What can have a gradient: q, k, v, bias, alibi_slopes, sinks."""
        return self.q, self.k, self.v, self.bias, self.alibi_slopes, self.sinks

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, in order."""
        others = (self.dense, self.key_lengths, self.cu_q, self.cu_k, self.global_keys, self.seed)
        return (*self.inputs(), *others)


class _Rows(NamedTuple):
    """Where queries stand among the keys; each [1|B, n] int64."""

    low: Tensor  # first key of the sequence
    high: Tensor  # behind its last key
    diagonal: Tensor  # the key that the query is aligned with


def _compute(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _place(p: Problem, rows: Tensor) -> _Rows:
    L, S = p.q.shape[2], p.k.shape[2]
    if p.cu_q is not None and p.cu_k is not None:
        cu_q, cu_k = p.cu_q.to(rows.device), p.cu_k.to(rows.device)
        n = torch.bucketize(rows, cu_q[1:], right=True)
        inside = n < cu_q.shape[0] - 1
        n = n.clamp(max=cu_q.shape[0] - 2)
        low, high = cu_k[n], cu_k[n + 1]
        diagonal = low + rows - cu_q[n]
        if p.causal == BOTTOM_RIGHT:
            diagonal = diagonal + (high - low) - (cu_q[n + 1] - cu_q[n])
        low, high = (torch.where(inside, t, 0).unsqueeze(0) for t in (low, high))  # padding sees nothing
        return _Rows(low, high, diagonal.unsqueeze(0))
    high = torch.full((1, 1), S, device=rows.device) if p.key_lengths is None else p.key_lengths.unsqueeze(1)
    high = high.to(rows.device)
    diagonal = rows.unsqueeze(0) + (high - L if p.causal == BOTTOM_RIGHT else 0)
    return _Rows(torch.zeros_like(high), high, diagonal)


def visible(p: Problem, rows: Tensor | None = None) -> Tensor:  # bool [1|B, 1, n, S]
    """Which keys the structure lets each query see; all queries by default. Leaves out `dense`."""
    device = p.q.device
    rows = torch.arange(p.q.shape[2], device=device) if rows is None else rows
    low, high, diagonal = (t.unsqueeze(-1) for t in _place(p, rows))
    j = torch.arange(p.k.shape[2], device=device)
    reach = (j >= low) & (j < high)
    if p.causal:
        reach = reach & (j <= diagonal)
    near = reach
    if p.left >= 0:
        near = near & (j >= diagonal - p.left)
    if p.right >= 0:
        near = near & (j <= diagonal + p.right)
    if p.global_keys is not None:  # seen from beyond the window, within everything else
        near = near | (reach & p.global_keys.unsqueeze(1))
    return near.unsqueeze(1)


def _keys(p: Problem, t: Tensor, dtype: torch.dtype) -> Tensor:  # k or v, [B, Hkv, S, .]
    """In the dtype of the computation, and nothing behind the end of a row: not even a NaN there may reach a sum."""
    t = t.to(dtype)
    if p.key_lengths is None:
        return t
    behind = torch.arange(t.shape[2], device=t.device) >= p.key_lengths.to(t.device).unsqueeze(1)
    return t.masked_fill(behind[:, None, :, None], 0.0)


class _Scores(NamedTuple):
    logits: Tensor  # [B, H, n, S], -inf where a query does not see the key
    slope: Tensor | None  # of the softcap at the raw score, [B, H, n, S]
    distance: Tensor | None  # from the diagonal, [1|B, 1, n, S]


def _pick(t: Tensor, dim: int, at: Tensor | None) -> Tensor:
    return t if at is None or t.shape[dim] == 1 else t.index_select(dim, at)


def _scores(p: Problem, dtype: torch.dtype, heads: Tensor | None = None, rows: Tensor | None = None) -> _Scores:
    q, k = _pick(_pick(p.q, 1, heads), 2, rows).to(dtype), _keys(p, p.k, dtype)
    G = p.q.shape[1] // max(p.k.shape[1], 1)
    if heads is not None:
        k = k.index_select(1, torch.div(heads, max(G, 1), rounding_mode="floor"))
    elif G != 1:
        k = k.repeat_interleave(G, dim=1)
    s = q @ k.transpose(-2, -1) * p.scale
    slope = None
    if p.softcap:
        t = (s / p.softcap).tanh()
        s, slope = p.softcap * t, 1 - t * t
    if p.bias is not None:
        s = s + _pick(_pick(p.bias, 1, heads), 2, rows).to(dtype)
    distance = None
    if p.alibi_slopes is not None:
        index = torch.arange(p.q.shape[2], device=q.device) if rows is None else rows
        j = torch.arange(p.k.shape[2], device=q.device)
        distance = (j - _place(p, index).diagonal.unsqueeze(-1)).abs().unsqueeze(1).to(dtype)
        s = s - _pick(p.alibi_slopes, 0, heads).to(dtype)[:, None, None] * distance
    seen = visible(p, rows)
    if p.dense is not None:
        seen = seen & _pick(_pick(p.dense, 1, heads), 2, rows)
    return _Scores(s.masked_fill(~seen, float("-inf")), slope, distance)


def _normalize(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:  # P [B, H, n, S], lse [B, H, n]
    """Softmax and its logarithmic denominator; where nothing is seen P = 0 and lse = -inf, both without gradient."""
    if sinks is not None:
        sinks = sinks.to(logits.dtype)[:, None].expand(logits.shape[:-1])
        logits = torch.cat([logits, sinks.unsqueeze(-1)], -1)
    if logits.shape[-1] == 0:
        return logits, logits.new_full(logits.shape[:-1], float("-inf"))
    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0.0, top)
    e = (logits - top).exp()
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), top + total.log()).squeeze(-1)
    P = e / total
    return (P if sinks is None else P[..., :-1]), lse


_M0, _M1, _W0, _W1, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Any, Any]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four 32-bit counters and two key words, each int64, to four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The low 64 bits of a product are right whether the type is signed or not.
        a, b = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """Random words below this are dropped."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def dropout_scale(p: Problem) -> Tensor:  # [B, Hq, L, S], 0 or 1 / (1 - p)
    """What dropout multiplies each probability with.

    Key j of query (b, h, i) has word (j / 16) % 4 of philox(counter = (16 (j / 64) + j % 16, i, h, b), key = (seed
    mod 2^32, seed / 2^32)) and is dropped if that word is below `threshold`.
    """
    B, H, L, _ = p.q.shape
    S = p.k.shape[2]
    assert p.seed is not None
    device = p.q.device
    seed = p.seed.to(device, torch.int64)
    blocks = (S + 63) // 64
    shape = (B, H, L, blocks * 16)
    index = [
        torch.arange(size, device=device).view([-1 if d == dim else 1 for d in range(4)]).expand(shape)
        for dim, size in enumerate(shape)
    ]
    words = philox((index[3], index[2], index[1], index[0]), (seed & _LOW, (seed >> 32) & _LOW))
    word = torch.stack([w.unflatten(3, (blocks, 16)) for w in words], 4).flatten(3)[..., :S]
    factor = 0.0 if p.dropout_p >= 1 else 1 / (1 - p.dropout_p)
    return (word >= threshold(p.dropout_p)).to(_compute(p.q)) * factor


def _values(p: Problem, dtype: torch.dtype) -> Tensor:  # [B, Hq, S, Ev]
    G = p.q.shape[1] // max(p.v.shape[1], 1)
    v = _keys(p, p.v, dtype)
    return v if G == 1 else v.repeat_interleave(G, dim=1)


def forward(p: Problem, compute_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """out [B, Hq, L, Ev] in the dtype of q, lse [B, Hq, L] in float32 (float64 for float64)."""
    dtype = compute_dtype or _compute(p.q)
    P, lse = _normalize(_scores(p, dtype).logits, p.sinks)
    if p.dropout_p:
        P = P * dropout_scale(p).to(dtype)
    return (P @ _values(p, dtype)).to(p.q.dtype), lse.to(_compute(p.q))


def probabilities(
    p: Problem,
    lse: Tensor,  # [B, Hq, L]
    heads: Tensor | None = None,  # [h] int64
    rows: Tensor | None = None,  # [n] int64
) -> Tensor:  # [B, h, n, S]
    """Before dropout, recomputed for chosen heads and rows."""
    logits = _scores(p, _compute(p.q), heads, rows).logits
    at = _pick(_pick(lse, 1, heads), 2, rows).to(logits.dtype).unsqueeze(-1)
    return (logits - torch.where(at == float("-inf"), 0.0, at)).exp()


Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def backward(p: Problem, dout: Tensor | None, dlse: Tensor | None, compute_dtype: torch.dtype | None = None) -> Grads:
    """Gradients of q, k, v, bias, alibi_slopes and sinks, by hand; in turn differentiable.

    With D = dout . out - dlse per row, the gradient of a logit is P (dP - D) and that of a sink -P_sink D.
    """
    dtype = compute_dtype or _compute(p.q)
    scores = _scores(p, dtype)
    P, lse = _normalize(scores.logits, p.sinks)
    v, G = _values(p, dtype), p.q.shape[1] // max(p.k.shape[1], 1)
    dropped = P * dropout_scale(p).to(dtype) if p.dropout_p else P
    dS, dv, D = torch.zeros_like(P), torch.zeros_like(v), torch.zeros_like(lse)
    if dout is not None:
        dout = dout.to(dtype)
        dv = dropped.transpose(-2, -1) @ dout
        dP = dout @ v.transpose(-2, -1)
        D = (dout * (dropped @ v)).sum(-1)
        dS = P * (-D.unsqueeze(-1)) + dropped * dP
    if dlse is not None:
        # Where lse = -inf nothing depends on anything, whatever gradient comes in.
        dlse = torch.where(lse == float("-inf"), 0.0, dlse.to(dtype))
        D, dS = D - dlse, dS + P * dlse.unsqueeze(-1)
    dsinks = dalibi = dbias = None
    if p.sinks is not None:
        P_sink = (p.sinks.to(dtype)[:, None] - lse).exp()
        dsinks = -(P_sink * D).sum((0, 2)).to(p.sinks.dtype)
    if p.bias is not None:
        dbias = dS.sum_to_size(p.bias.shape).to(p.bias.dtype)
    if p.alibi_slopes is not None and scores.distance is not None:
        dalibi = -(dS * scores.distance).sum((0, 2, 3)).to(p.alibi_slopes.dtype)
    if scores.slope is not None:
        dS = dS * scores.slope
    dS = dS * p.scale
    k = _keys(p, p.k, dtype)
    dq = dS @ (k if G == 1 else k.repeat_interleave(G, dim=1))
    dk = dS.transpose(-2, -1) @ p.q.to(dtype)
    if G != 1:
        dk, dv = (t.unflatten(1, (-1, G)).sum(2) if t.shape[1] else t.new_zeros(shape) for t, shape in
                  ((dk, p.k.shape), (dv, p.v.shape)))  # fmt: skip
    return dq.to(p.q.dtype), dk.to(p.k.dtype), dv.to(p.v.dtype), dbias, dalibi, dsinks
