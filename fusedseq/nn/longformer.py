"""Longformer's self-attention (Beltagy et al. 2020, arXiv:2004.05150): a window, and tokens that see everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedseq import ops
from fusedseq.nn.masks import read_masks
from fusedseq.ops import Mask


class LongformerSelfAttention(nn.Module):
    r"""Attention within a window, with global tokens that have projections of their own; cost linear in L.

    A token sees the keys at most ``window // 2`` away and the global tokens. A global token sees all keys, through the
    projections ``query_global``, ``key_global`` and ``value_global`` (Beltagy et al. 2020, section 3.1). Parameters are
    named as in Hugging Face's ``LongformerSelfAttention``, so its state_dict loads.

    Args:
        embed_dim: features, E.
        num_heads: heads, H; divides E.
        window: width of the window, both sides together; even and positive.
        dropout: probability with which a softmax weight is zeroed, in training.
        bias: whether the projections have biases.
        device, dtype: of the parameters. float32, float64, bfloat16 and float16; half types compute in float32.

    Inputs:
        x: ``[B, L, E]``.
        key_padding_mask: bool ``[B, L]``, true for padding, which is not seen and gives 0.
        global_mask: bool ``[B, L]``, true for global tokens. None: there are none.

    Outputs: ``[B, L, E]``, heads side by side, without an output projection.

    Raises:
        ValueError: sizes that do not fit, at construction or at the call.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_global: nn.Linear
    key_global: nn.Linear
    value_global: nn.Linear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        if window <= 0 or window % 2:
            raise ValueError(f"window must be even and positive, got {window}")
        self.embed_dim, self.num_heads, self.window, self.dropout = embed_dim, num_heads, window, dropout
        for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
            self.add_module(name, nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, global_mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Return what each token sees."""
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x: expected shape (B, L, {self.embed_dim}), got {tuple(x.shape)}")
        for name, mask in (("key_padding_mask", key_padding_mask), ("global_mask", global_mask)):
            if mask is not None and (mask.dtype is not torch.bool or mask.shape != x.shape[:2]):
                raise ValueError(f"{name}: expected bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        return attend(self, x, key_padding_mask, global_mask, self.window // 2)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, window={self.window}, dropout={self.dropout}"


def attend(
    module: Any,
    x: Tensor,  # [B, L, E]
    key_padding_mask: Tensor | None,  # bool [B, L]
    global_mask: Tensor | None,  # bool [B, L]
    side: int,
) -> Tensor:  # [B, L, E]
    """What `LongformerSelfAttention` computes, for any module with its six projections, `num_heads` and `dropout`.

    A token sees the keys at most `side` away. Padding counts as no global token.
    """
    if global_mask is not None and key_padding_mask is not None:
        global_mask = global_mask & ~key_padding_mask
    dropout = module.dropout if module.training else 0.0
    padding = read_masks(x.dtype, module.num_heads, key_padding_mask, None, causal=False, extra=0).mask or Mask()
    local = Mask(window=(side, side), key_lengths=padding.key_lengths, dense=padding.dense, global_tokens=global_mask)
    q, k, v = (_heads(project(x), module.num_heads) for project in (module.query, module.key, module.value))
    out = ops.attention(q, k, v, mask=local, dropout_p=dropout).transpose(1, 2).flatten(2)
    if global_mask is not None:
        out = _attend_globally(module, x, out, global_mask, padding, dropout)
    return out if key_padding_mask is None else out.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)


def _heads(t: Tensor, heads: int) -> Tensor:  # [B, L, E] -> [B, H, L, E/H]
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend_globally(
    module: Any, x: Tensor, out: Tensor, global_mask: Tensor, padding: Mask, dropout: float
) -> Tensor:  # fmt: skip
    """The output with the rows of global tokens put in their places."""
    batch, place = global_mask.nonzero(as_tuple=True)
    if not len(batch):
        return out
    # Row b's n-th global token is query n of its batch row; rows with fewer of them are filled up with zeros.
    slot = (global_mask.cumsum(1) - 1)[batch, place]
    rows = x.new_zeros(x.shape[0], int(slot.max()) + 1, x.shape[2]).index_put((batch, slot), x[batch, place])
    q, k, v = (
        _heads(project(t), module.num_heads)
        for project, t in ((module.query_global, rows), (module.key_global, x), (module.value_global, x))
    )
    seen = ops.attention(q, k, v, mask=padding, dropout_p=dropout).transpose(1, 2).flatten(2)
    return out.index_put((batch, place), seen[batch, slot])
