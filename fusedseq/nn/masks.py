"""The masks of torch.nn's attention modules as structure, where key lengths or causality is all that they say."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedseq.ops import Mask

_pad = F.pad
_canonical_mask: Any = F._canonical_mask
_dispatch_modes = torch._C._len_torch_dispatch_stack
_interpreters = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


class AttentionMask(NamedTuple):
    """What `ops.attention` is to be told."""

    mask: Mask | None
    bias: Tensor | None  # added to the logits, broadcastable to [B, H, L, S]


def readable(t: Tensor) -> bool:
    """Whether a decision may hang on the values: they exist, cost no wait, and are not those of one trace only."""
    if torch.compiler.is_compiling() or t.device.type != "cpu" or t.requires_grad:
        return False
    return not _dispatch_modes() and _interpreters() is None and _tracing_state() is None


def is_causal(mask: Tensor) -> bool:  # [L, S], bool or floating
    """Whether a mask that is true, or -inf, where a query must not look is exactly the causal one."""
    L, S = mask.shape
    if not L or not S:
        return False
    hide = True if mask.dtype is torch.bool else float("-inf")
    # Two rows tell most other masks apart, at O(S).
    if not bool((mask[0, 1:] == hide).all()) or not bool((mask[-1, :L] == 0).all()):
        return False
    return torch.equal(mask, torch.full_like(mask, hide).triu_(1))


def key_lengths(hidden: Tensor) -> Tensor | None:  # bool [B, S] -> int64 [B]
    """How many keys each row has, or None if any but the last ones are hidden."""
    if bool((hidden[:, :-1] > hidden[:, 1:]).any()):
        return None
    return hidden.shape[1] - hidden.sum(1)


def _as_hidden(padding: Tensor) -> Tensor | None:  # [B, S] -> bool [B, S]
    """Padding as a boolean, if it is one: torch's own modules hand on -inf for true and 0 for false."""
    if padding.dtype is torch.bool:
        return padding
    if not readable(padding):
        return None
    hidden = padding == float("-inf")
    return hidden if bool((hidden | (padding == 0)).all()) else None


def read_masks(
    dtype: torch.dtype,
    heads: int,
    padding: Tensor | None,  # [B, S] or [S]
    attn_mask: Tensor | None,  # [L, S] or [B*H, L, S]
    *,
    causal: bool,
    extra: int,
) -> AttentionMask:
    """Masks whose shapes have been checked.

    Args:
        dtype: that of the query.
        causal: attn_mask is said to be the causal mask, and that is to be believed.
        extra: keys behind those that the masks know, which every query sees.
    """
    lengths = dense = bias = None
    if padding is not None:
        # torch refuses other types here, and warns where the two are not of one.
        other = F._none_or_dtype(attn_mask)
        if padding.dtype is not torch.bool or other not in (None, torch.bool):
            padding = _canonical_mask(padding, "key_padding_mask", other, "attn_mask", dtype)
        padding = padding.unsqueeze(0) if padding.dim() == 1 else padding
        hidden = _as_hidden(padding)
        if hidden is None:
            bias = _widen(padding, extra)[:, None, None, :]
        else:
            if not extra and readable(hidden):
                lengths = key_lengths(hidden)
            if lengths is None:
                dense = ~_widen(hidden, extra)[:, None, None, :]
            elif bool((lengths == hidden.shape[1]).all()):
                lengths = None
    if attn_mask is not None and not causal:
        causal = not extra and attn_mask.dim() == 2 and readable(attn_mask) and is_causal(attn_mask)
    if attn_mask is not None and not causal:
        if attn_mask.dtype is not torch.bool:
            attn_mask = _canonical_mask(attn_mask, "attn_mask", None, "", dtype, False)
        table = _widen(attn_mask, extra)
        table = table[None, None] if table.dim() == 2 else table.unflatten(0, (-1, heads))
        if table.dtype is torch.bool:
            dense = ~table if dense is None else dense & ~table
        else:
            bias = table if bias is None else bias + table
    if not causal and lengths is None and dense is None:
        return AttentionMask(None, bias)
    return AttentionMask(Mask("top-left" if causal else None, key_lengths=lengths, dense=dense), bias)


def _widen(mask: Tensor, extra: int) -> Tensor:
    return _pad(mask, (0, extra)) if extra else mask
