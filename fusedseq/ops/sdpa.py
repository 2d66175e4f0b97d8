"""torch.nn.functional.scaled_dot_product_attention, by our kernels."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedseq.ops import attention_check as check
from fusedseq.ops.attention import run
from fusedseq.ops.attention_repeat import recall
from fusedseq.ops.check import DTYPES
from fusedseq.ops.mask import Mask
from fusedseq.ops.scan import is_autocasting

# Taken at import: once somebody has put ours in its place, looking it up would find ourselves.
_torch_sdpa = F.scaled_dot_product_attention
_TOP_LEFT = Mask("top-left")
_BOTH = "_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True"


def scaled_dot_product_attention(
    query: Tensor,  # [..., Hq, L, E]
    key: Tensor,  # [..., H, S, E]
    value: Tensor,  # [..., H, S, Ev]
    attn_mask: Tensor | None = None,  # broadcastable to [..., Hq, L, S]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # [..., Hq, L, Ev]
    """A drop-in for `torch.nn.functional.scaled_dot_product_attention`: same arguments, results and errors.

    Takes any number of leading dimensions, also broadcast ones; `attn_mask` is boolean (true takes part), or floating
    and added to the logits, or a `torch.nn.attention.bias.CausalBias`; `is_causal` is aligned top-left. `is_causal`
    together with a mask is the error that torch documents. Rows without a key to see are 0. Dropout is drawn from a
    seed that torch's generator gives, but not from the same numbers as torch's.
    """
    args: tuple[Any, ...] = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not all(isinstance(t, Tensor) for t in args[:3]):
        return _refuse(args)
    plain = attn_mask is None and dropout_p == 0 and query.dim() == key.dim() == value.dim() == 4
    if plain and (enable_gqa or query.shape[1] == key.shape[1]):
        mask = _TOP_LEFT if is_causal else None
        known = recall(check.problem(query, key, value, mask, None, None, None, scale, None, 0.0, None))
        if known is not None:
            return known[0]
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if not _plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        return _refuse(args)
    mask = None
    if is_causal:
        if attn_mask is not None:
            raise RuntimeError(_BOTH)
        mask = _TOP_LEFT
    lead = query.shape[:-2]
    if not (lead == key.shape[:-2] == value.shape[:-2]):
        if enable_gqa:
            if query.shape[:-3] != key.shape[:-3] or query.shape[:-3] != value.shape[:-3]:
                return _refuse(args)
        else:
            try:
                lead = torch.broadcast_shapes(lead, key.shape[:-2], value.shape[:-2])
            except RuntimeError:
                return _refuse(args)
            query, key, value = (t.expand(*lead, *t.shape[-2:]) for t in (query, key, value))
    if _is_causal_bias(attn_mask):
        lower_right = getattr(attn_mask, "variant", None) == _causal_bias().CausalVariant.LOWER_RIGHT
        mask, attn_mask = Mask("bottom-right" if lower_right else "top-left"), None
    bias = None
    if attn_mask is not None:
        attn_mask = _four(attn_mask, lead)
        if attn_mask.dtype is torch.bool:
            mask = Mask(dense=attn_mask)
        else:
            bias = attn_mask
    shape = (*query.shape[:-1], value.shape[-1])
    q, k, v = (_as_heads(t) for t in (query, key, value))
    p = check.problem(q, k, v, mask, bias, None, None, scale, None, dropout_p, None)
    try:
        check.shapes(p)
    except (TypeError, ValueError):
        return _refuse(args)
    out, _ = run(p)
    return out if out.shape == shape else out.reshape(shape)


def _autocast(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Any, ...]:
    """Under autocast inputs may differ in dtype; what the operator itself would not accept is cast here already."""
    if not is_autocasting() or not torch.is_autocast_enabled(q.device.type):
        return q, k, v, mask
    alike = q.dtype == k.dtype == v.dtype
    if alike and (not isinstance(mask, Tensor) or mask.dtype in (torch.bool, torch.float32, q.dtype)):
        return q, k, v, mask
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (q, k, v, mask)
    )


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_p: float, is_causal: bool, scale: Any, gqa: bool
) -> bool:
    """What can be said before anything is broadcast."""
    if min(q.dim(), k.dim(), v.dim()) < 2 or q.dtype not in DTYPES or not (q.dtype == k.dtype == v.dtype):
        return False
    if not 0 <= dropout_p <= 1 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return False
    if gqa and (min(q.dim(), k.dim(), v.dim()) < 3 or 0 in (k.shape[-3], v.shape[-3])):
        return False
    if gqa and (q.shape[-3] % k.shape[-3] or k.shape[-3] != v.shape[-3]):
        return False
    if mask is None or _is_causal_bias(mask):
        return True
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return False
    full = (*q.shape[:-1], k.shape[-2])
    short = zip(reversed(mask.shape), reversed(full), strict=False)
    return mask.dim() <= max(len(full), k.dim(), v.dim()) and all(
        size in (1, fits) or (fits == 1 and dim >= 2) for dim, (size, fits) in enumerate(short)
    )


def _causal_bias() -> Any:
    """torch's module of CausalBias, None as long as nobody has imported it: it brings TorchDynamo along."""
    return sys.modules.get("torch.nn.attention.bias")


def _is_causal_bias(mask: Any) -> bool:
    return _causal_bias() is not None and isinstance(mask, _causal_bias().CausalBias)


def _as_heads(t: Tensor) -> Tensor:
    """[..., H, L, E] as [B, H, L, E]."""
    if t.dim() == 4:
        return t
    if t.dim() < 4:
        return t[(None,) * (4 - t.dim())]
    return t.flatten(0, -4)


def _four(mask: Tensor, lead: torch.Size) -> Tensor:
    """A mask as [1|B, 1|H, 1|L, 1|S]; only leading dimensions beyond the head's, if it has them, are expanded."""
    if mask.dim() <= 4 and len(lead) <= 2:
        return mask[(None,) * (4 - mask.dim())]
    if mask.dim() <= 3 or all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(mask.shape[-3:])[None] if mask.dim() >= 3 else mask[(None,) * (4 - mask.dim())]
    return mask.expand(*lead[:-1], *mask.shape[-3:]).flatten(0, -4)


def _refuse(args: tuple[Any, ...]) -> Tensor:
    """Let torch say what is wrong, in its own words."""
    query, key, value, mask, *_ = args
    _torch_sdpa(query, key, value, mask, dropout_p=args[4], is_causal=args[5], scale=args[6], enable_gqa=args[7])
    raise RuntimeError("fusedseq.scaled_dot_product_attention does not take these arguments, although torch does")
