"""What a caller of attention can get wrong, and the one form in which backends are given a call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedseq.ops.check import DTYPES, _bad_type, _bad_value, _shape
from fusedseq.ops.mask import Mask
from fusedseq.reference.attention import BOTTOM_RIGHT, TOP_LEFT, Problem

_CAUSAL = {None: 0, "top-left": TOP_LEFT, "bottom-right": BOTTOM_RIGHT}
_INTEGERS = (torch.int64, torch.int32)


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
) -> Problem:
    """The arguments of the public function in the form of the operator; sizes are checked by `shapes`."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            _bad_type(name, "a tensor", type(t).__name__)
        if t.dim() != 4:
            heads = "Hq, L" if name == "q" else "Hkv, S"
            _bad_value(name, f"4 dimensions [B, {heads}, {'Ev' if name == 'v' else 'E'}]", _shape(t.shape))
    for name, optional in (("bias", bias), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if optional is not None and not isinstance(optional, Tensor):
            _bad_type(name, "a tensor or None", type(optional).__name__)
    dense = key_lengths = cu_q = cu_k = global_keys = None
    causal, left, right = 0, -1, -1
    if bias is not None:
        bias = _four("bias", bias)
    if mask is not None:
        if not isinstance(mask, Mask):
            _bad_type("mask", "a fusedseq.Mask or None", type(mask).__name__)
        causal = _CAUSAL[mask.causal]
        if mask.window is not None:
            left, right = (-1 if side is None else side for side in mask.window)
        if causal:
            right = 0  # the window's own bound on the right can only be wider
        key_lengths = mask.key_lengths
        if mask.dense is not None:
            table = _four("dense", mask.dense)
            if table.dtype is torch.bool:
                dense = table
            else:
                bias = table if bias is None else bias + table
        if mask.cu_seqlens is not None:
            cu = mask.cu_seqlens
            cu_q, cu_k = (cu, cu) if isinstance(cu, Tensor) else cu
        if mask.global_tokens is not None:
            global_keys = mask.global_tokens
            if global_keys.dim() == 1:
                global_keys = global_keys.unsqueeze(0)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    if not 0 <= dropout_p <= 1:
        _bad_value("dropout_p", "a probability between 0 and 1", dropout_p)
    if softcap is not None and not softcap > 0:
        _bad_value("softcap", "a positive number or None", softcap)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (), device=q.device)
    elif not isinstance(seed, Tensor):
        seed = torch.tensor(seed, dtype=torch.int64, device=q.device)
    return Problem(
        q, k, v, bias, alibi_slopes, sinks, dense, key_lengths, cu_q, cu_k, global_keys, seed,
        causal, left, right, float(scale), softcap or 0.0, float(dropout_p),
    )  # fmt: skip


def _four(name: str, t: Tensor) -> Tensor:
    if t.dim() > 4:
        _bad_value(name, "at most 4 dimensions, broadcastable to [B, Hq, L, S]", _shape(t.shape))
    return t if t.dim() == 4 else t[(None,) * (4 - t.dim())]


def shapes(p: Problem) -> None:
    """Sizes, dtypes and devices; values are left to `data`."""
    q, k, v = p.q, p.k, p.v
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES:
        _bad_type("q", "dtype float32, float64, bfloat16 or float16", dtype)
    B, Hq, L, E = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    if k.shape[0] != B or k.shape[3] != E:
        _bad_value("k", f"shape {_shape((B, 'Hkv', 'S', E))}, with B and E of q", _shape(k.shape))
    if (Hkv == 0 and Hq) or (Hkv and Hq % Hkv):
        _bad_value("k", f"a number of heads that divides the {Hq} of q", Hkv)
    if v.shape[:3] != k.shape[:3]:
        _bad_value("v", f"shape {_shape((B, Hkv, S, 'Ev'))}, with B, Hkv and S of k", _shape(v.shape))
    for name, t in (("k", k), ("v", v)):
        if t.dtype is not dtype:
            _bad_type(name, f"dtype {dtype}, that of q", t.dtype)
        if t.device != device:
            _bad_type(name, f"device {device}, that of q", t.device)
    if p.bias is not None:
        if p.bias.dtype not in (dtype, torch.float32):
            _bad_type("bias", f"dtype {dtype}, that of q, or torch.float32", p.bias.dtype)
        _broadcastable("bias", p.bias, (B, Hq, L, S), device)
    if p.dense is not None:
        _broadcastable("dense", p.dense, (B, Hq, L, S), device)
    for name, per_head in (("alibi_slopes", p.alibi_slopes), ("sinks", p.sinks)):
        if per_head is None:
            continue
        if per_head.shape != (Hq,):
            _bad_value(name, f"shape {_shape((Hq,))}, one for each head of q", _shape(per_head.shape))
        if not per_head.dtype.is_floating_point:
            _bad_type(name, "a floating dtype", per_head.dtype)
        if per_head.device != device:
            _bad_type(name, f"device {device}, that of q", per_head.device)
    if p.key_lengths is not None:
        if p.key_lengths.shape != (B,):
            _bad_value("key_lengths", f"shape {_shape((B,))}", _shape(p.key_lengths.shape))
        if p.key_lengths.dtype not in _INTEGERS:
            _bad_type("key_lengths", "dtype torch.int64 or torch.int32", p.key_lengths.dtype)
    if p.cu_q is not None or p.cu_k is not None:
        _packed(p.cu_q, p.cu_k, B)
    if p.global_keys is not None:
        if p.global_keys.dtype is not torch.bool:
            _bad_type("global_tokens", "dtype torch.bool", p.global_keys.dtype)
        if p.global_keys.dim() != 2 or p.global_keys.shape[1] != S or p.global_keys.shape[0] not in (1, B):
            _bad_value("global_tokens", f"shape {_shape((S,))} or {_shape((B, S))}", _shape(p.global_keys.shape))
    if p.dropout_p and (p.seed is None or p.seed.numel() != 1):
        _bad_value("seed", "one integer together with dropout_p", p.seed)


def _broadcastable(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if t.dim() != 4 or any(size not in (1, full) for size, full in zip(t.shape, shape, strict=True)):
        _bad_value(name, f"a shape that broadcasts to {_shape(shape)}", _shape(t.shape))
    if t.device != device:
        _bad_type(name, f"device {device}, that of q", t.device)


def _packed(cu_q: Any, cu_k: Any, B: int) -> None:
    for cu in (cu_q, cu_k):
        if not isinstance(cu, Tensor):
            _bad_type("cu_seqlens", "a tensor or a pair of tensors", type(cu).__name__)
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.shape != cu_q.shape:
            got = f"{_shape(cu_q.shape)} and {_shape(cu.shape)}" if cu is cu_k else _shape(cu.shape)
            _bad_value("cu_seqlens", "shape [N + 1], for queries and keys alike", got)
        if cu.dtype not in _INTEGERS:
            _bad_type("cu_seqlens", "dtype torch.int64 or torch.int32", cu.dtype)
    if B != 1:
        _bad_value("cu_seqlens", "one batch row (B = 1) that holds the packed sequences", f"B = {B}")


def data(p: Problem) -> Problem:
    """Check the values of lengths, and return the problem with them as backends take them: dense int64."""
    if p.key_lengths is None and p.cu_q is None:
        return p
    key_lengths, cu_q, cu_k = (_index(t, p.q.device) for t in (p.key_lengths, p.cu_q, p.cu_k))
    S = p.k.shape[2]
    if key_lengths is not None and key_lengths.numel():
        low, high = (int(bound) for bound in torch.aminmax(key_lengths))
        if low < 0:
            _bad_value("key_lengths", "no negative entry", low)
        if high > S:
            _bad_value("key_lengths", f"entries of at most S = {S}", high)
    for cu, size, what in ((cu_q, p.q.shape[2], "L"), (cu_k, S, "S")):
        if cu is None:
            continue
        if int(cu[0]) != 0 or not bool((cu[1:] >= cu[:-1]).all()):
            _bad_value("cu_seqlens", "non-decreasing entries from 0 on", cu.tolist())
        if int(cu[-1]) > size:
            _bad_value("cu_seqlens", f"a last entry of at most {what} = {size}", int(cu[-1]))
    return p._replace(key_lengths=key_lengths, cu_q=cu_q, cu_k=cu_k)


def _index(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, torch.int64).contiguous()
