"""The attention function that `register` makes known to transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fusedseq import ops
from fusedseq.interop.huggingface.lazy import AttentionMask
from fusedseq.interop.huggingface.masks import attention_mask as mask_function
from fusedseq.ops import Mask
from fusedseq.ops.check import _bad_type, _bad_value, _shape

# What some models hand to kernels of their own instead of putting it into the mask.
_UNKNOWN = ("indices", "block_indices", "sinks", "block_table")


def register(name: str = "fusedseq") -> str:
    """Make fusedseq's attention available to transformers as `attn_implementation=name`; returns the name.

    Registers the attention function and the mask function: without the latter transformers would pass models no mask at
    all. Models are then loaded, or switched, as for any other implementation:
    ``AutoModel.from_pretrained(path, attn_implementation="fusedseq")``, ``model.set_attn_implementation("fusedseq")``.
    Registering twice changes nothing.

    Raises:
        ValueError: name is one that transformers itself uses.
    """
    taken = AttentionInterface._global_mapping.get(name)
    if name == "eager" or (taken is not None and taken is not attention_forward):
        _bad_value("name", "one that no other attention implementation has", repr(name))
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, mask_function)
    return name


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, Hq, L, E]
    key: Tensor,  # [B, Hkv, S, E]
    value: Tensor,  # [B, Hkv, S, Ev]
    attention_mask: Tensor | None,  # [B, 1|Hq, L, S]
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,  # broadcastable to [B, Hq, L, S]
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # Hq elements
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # [B, L, Hq, Ev], [B, Hq, L, S]
    """transformers' attention function of the name "fusedseq".

    Args:
        module: the caller; read are `training` (no dropout without it) and, for want of better, `is_causal`.
        attention_mask: what our mask function made; or a bool tensor, true where a query sees a key; or a floating one,
            added to the logits. The window of a model is in it: `sliding_window` is not read.
        is_causal: what to do without a mask, `module.is_causal` by default: query i sees keys 0 to i. Does not matter
            for a single query or with a mask, as in transformers' own "sdpa".
        position_bias: added to the logits, differentiable (T5).
        softcap: bound of the logits before bias and mask (Gemma 2).
        s_aux: sinks, a logit per head that counts in the denominator only (gpt-oss).
        output_attentions: also return the softmax weights, those before dropout. Costs what "eager" costs.

    Raises:
        ArgumentValueError, ArgumentTypeError: shapes that do not fit, or an argument of transformers' that changes the
            result and that this function does not know: paged caches, sparse indices, sinks per token.
    """
    _refuse_unknown(attention_mask, kwargs)
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)
    mask, bias = _read(attention_mask, query, key)
    if attention_mask is None and query.shape[2] > 1:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = Mask("top-left") if causal else None
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    if bias is not None and bias.dtype not in (query.dtype, torch.float32):
        bias = bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    sinks = None if s_aux is None else s_aux.reshape(-1)
    out, lse = ops.attention(
        query, key, value, mask=mask, bias=bias, scale=scaling, softcap=softcap, sinks=sinks,
        dropout_p=dropout if module.training else 0.0, return_lse=True,
    )  # fmt: skip
    weights = None
    if output_attentions:
        weights = ops.attention_probs(query, key, lse, mask=mask, bias=bias, scale=scaling, softcap=softcap)
        weights = weights.to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _read(mask: Any, query: Tensor, key: Tensor) -> tuple[Mask | None, Tensor | None]:
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        _bad_type("attention_mask", "a tensor or None", type(mask).__name__)
    if isinstance(mask, AttentionMask):
        if mask.shape[2:] != (query.shape[2], key.shape[2]):
            want = f"a mask for {query.shape[2]} queries and {key.shape[2]} keys"
            _bad_value("attention_mask", want, _shape(mask.shape))
        return mask.mask(), None
    if mask.dtype is torch.bool:
        return Mask(dense=mask), None
    if not mask.dtype.is_floating_point:
        _bad_type("attention_mask", "dtype torch.bool, true where a query sees a key, or a floating one", mask.dtype)
    return None, mask


def _refuse_unknown(mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            _bad_value(name, 'None with attn_implementation="fusedseq", which has no such attention', "a value")
    if mask is None and kwargs.get("cu_seq_lens_q") is not None:
        # Only flash kernels are called with these alone, continuous batching among the callers.
        _bad_value("cu_seq_lens_q", "a mask or position_ids that say where packed sequences begin", "lengths alone")
