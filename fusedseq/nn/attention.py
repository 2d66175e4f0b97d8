"""MultiheadAttention: torch.nn's module over the fused attention, in training and evaluation alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from fusedseq import ops
from fusedseq.nn.masks import AttentionMask, read_masks
from fusedseq.nn.scan import ArgumentErrors, foreign
from fusedseq.nn.twins import FUSED, Fused, TorchMultiheadAttention, base_name
from fusedseq.ops.linear import linear as _linear

_NEEDS_MASK = (
    "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
    "`generate_square_subsequent_mask` to create this mask."
)


def stock_refusal(module: torch.nn.Module, error: Exception | None, *args: Any, **kwargs: Any) -> Exception:
    """What torch.nn raises for these arguments, or `error` if it is torch.nn that would take them."""
    stock: Any = super(Fused, module)
    try:
        stock.forward(*args, **kwargs)
    except Exception as e:
        return e
    return error or TypeError(f"fusedseq.{base_name(type(module))} does not take these arguments, though torch.nn does")


def record_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stay one node in a symbolic trace, as the modules of torch.nn do; None if nothing is being traced."""
    proxy = next((a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)), None)
    if proxy is None:
        return None
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


class MultiheadAttention(Fused, TorchMultiheadAttention):
    r"""Attention of several heads (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2).

    Parameters, their names and initialisation, state_dict, errors and results are those of the module of torch.nn.
    There is one way of computing, so that training, evaluation and `torch.no_grad` give the same numbers.

    Args:
        embed_dim: features of the query and of the output, E.
        num_heads: heads, H; divides E.
        dropout: probability with which a softmax weight is zeroed, in training.
        bias: whether the projections have biases.
        add_bias_kv: one more key and value, both learned.
        add_zero_attn: one more key and value, both zero.
        kdim, vdim: features of the keys and of the values, E by default.
        batch_first: tensors are ``[B, L, E]`` in place of ``[L, B, E]``.
        device, dtype: of the parameters. float32, float64, bfloat16 and float16; half types compute in float32.

    Inputs:
        query: ``[L, B, E]``, ``[B, L, E]`` with batch_first, ``[L, E]`` unbatched; key and value likewise, S long.
        key_padding_mask: ``[B, S]`` (``[S]`` unbatched), bool and true for keys to leave out, or floating and added to
            the logits. Padding that is on the right alone is skipped, not computed and masked, on the CPU.
        attn_mask: ``[L, S]`` or ``[B*H, L, S]``, bool and true for pairs to leave out, or floating and added.
        is_causal: a promise that attn_mask is the causal mask. As in torch, the mask is then not looked at where there
            is neither a key_padding_mask nor need_weights. A causal mask is recognised without it on the CPU.
        need_weights, average_attn_weights: return the softmax weights, of each head or their average over the heads.
            They cost memory of their size, so pass ``need_weights=False`` where they are not used.

    Outputs:
        output, laid out as the query, and the weights ``[B, L, S]`` (``[B, H, L, S]`` if not averaged, without ``B``
        unbatched; dropout shows in them) or None. Where all keys are left out, the weights are 0 and the output is the
        bias of its projection; torch.nn gives NaN there with ``need_weights=True``.

    Raises:
        What torch.nn.MultiheadAttention raises: AssertionError or RuntimeError for shapes that do not fit,
        RuntimeError for other dtypes.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if asked for, the softmax weights."""
        args = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        traced = record_call(self, *args)
        if traced is not None:
            return traced
        if not self._fits(query, key, value, key_padding_mask, attn_mask):
            if any(isinstance(t, Tensor) and t.is_nested for t in args[:3]):
                return super().forward(*args)  # ragged batches are torch's, which takes them in evaluation
            raise stock_refusal(self, None, *args)
        if is_causal and attn_mask is None:
            raise stock_refusal(self, RuntimeError(_NEEDS_MASK), *args)
        weights = [w for w in (self.in_proj_weight, self.q_proj_weight, self.out_proj.weight) if w is not None]
        if foreign(weights):
            return super().forward(*args)
        batched = query.dim() == 3
        heads = self._heads(query, key, value, 0 if self.batch_first or not batched else 1)
        masks = read_masks(
            query.dtype, self.num_heads, key_padding_mask, attn_mask,
            causal=is_causal and key_padding_mask is None and not need_weights,
            extra=heads[1].shape[2] - key.shape[1 if self.batch_first and batched else 0],
        )  # fmt: skip
        try:
            out, probs = self._attend(*heads, masks, need_weights)
        except ArgumentErrors as e:
            raise stock_refusal(self, e, *args) from None
        out = out.transpose(1, 2) if self.batch_first or not batched else out.permute(2, 0, 1, 3)
        out = _linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if probs is not None and average_attn_weights:
            probs = probs.mean(1)
        if batched:
            return out, probs
        return out.squeeze(0), None if probs is None else probs.squeeze(0)

    def _fits(self, query: Any, key: Any, value: Any, padding: Any, attn_mask: Any) -> bool:
        """Whether the sizes are those of a call; dtypes and devices show in the products."""
        for t in (query, key, value):
            if not isinstance(t, Tensor) or t.is_nested or t.dim() != query.dim():
                return False
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            return False
        if key.shape[-1] != self.kdim or value.shape[-1] != self.vdim or key.shape[:-1] != value.shape[:-1]:
            return False
        if (self.bias_k is None) != (self.bias_v is None):
            return False
        sequence, batch = (0, None) if query.dim() == 2 else (1, 0) if self.batch_first else (0, 1)
        L, S = query.shape[sequence], key.shape[sequence]
        B = 1 if batch is None else query.shape[batch]
        if batch is not None and key.shape[batch] != B:
            return False
        if padding is not None and (
            not isinstance(padding, Tensor) or padding.shape != ((S,) if batch is None else (B, S))
        ):
            return False
        return attn_mask is None or (
            isinstance(attn_mask, Tensor) and attn_mask.shape in ((L, S), (B * self.num_heads, L, S))
        )

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The projections [B, H, L, E/H] and [B, H, S, E/H], with the keys and values that every sequence gets."""
        E, H = self.embed_dim, self.num_heads
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            w = self.in_proj_weight
            if query is key and key is value:
                q, k, v = _linear(query, w, bias).chunk(3, -1)
            else:
                w_q, w_kv = w.split((E, 2 * E))
                b_q, b_kv = (None, None) if bias is None else bias.split((E, 2 * E))
                q = _linear(query, w_q, b_q)
                if key is value:
                    k, v = _linear(key, w_kv, b_kv).chunk(2, -1)
                else:
                    (w_k, w_v), (b_k, b_v) = w_kv.chunk(2), (None, None) if b_kv is None else b_kv.chunk(2)
                    k, v = _linear(key, w_k, b_k), _linear(value, w_v, b_v)
        else:
            b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
            q = _linear(query, self.q_proj_weight, b_q)
            k = _linear(key, self.k_proj_weight, b_k)
            v = _linear(value, self.v_proj_weight, b_v)
        if query.dim() == 2:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        order = (0, 2, 1, 3) if batch == 0 else (1, 2, 0, 3)
        q, k, v = (t.unflatten(-1, (H, E // H)).permute(order) for t in (q, k, v))
        more: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            row = (1, H, 1, E // H)
            more.append((self.bias_k.reshape(row), self.bias_v.reshape(row)))
        if self.add_zero_attn:
            more.append((k.new_zeros(1, 1, 1, 1), v.new_zeros(1, 1, 1, 1)))
        if more:
            last = (*k.shape[:2], 1, k.shape[3])
            k = torch.cat([k, *(extra.expand(last) for extra, _ in more)], 2)
            v = torch.cat([v, *(extra.expand(last) for _, extra in more)], 2)
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: AttentionMask, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = float(self.dropout) if self.training else 0.0
        mask, bias = masks
        if not need_weights:
            return ops.attention(q, k, v, mask=mask, bias=bias, dropout_p=dropout), None
        autocasting = torch.is_autocast_enabled(q.device.type)
        if bias is not None and bias.dtype != q.dtype and not autocasting:
            raise ops.ArgumentTypeError(f"attn_mask: expected dtype {q.dtype}, got {bias.dtype}")
        if autocasting:
            k, v = k.to(q.dtype), v.to(q.dtype)  # the learned key and value are not products
        out, lse = ops.attention(q, k, v, mask=mask, bias=bias, return_lse=True)
        probs = ops.attention_probs(q, k, lse, mask=mask, bias=bias)
        if not (autocasting and q.is_cuda):  # where torch's softmax gives float32
            probs = probs.to(q.dtype)
        if dropout:
            # The caller is to get the very weights that made the output, so dropout is drawn on the stored ones.
            probs = F.dropout(probs, dropout)
            out = (probs.to(v.dtype) @ v).to(q.dtype)
        return out, probs


FUSED[TorchMultiheadAttention] = MultiheadAttention
