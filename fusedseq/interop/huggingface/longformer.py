"""Longformer and LED compute attention by themselves, so their modules are swapped."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.models.led.modeling_led import LEDEncoderSelfAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from fusedseq.nn.fuse import Entry, FuseReport
from fusedseq.nn.longformer import attend


def _forward(
    self: Any,
    hidden_states: Tensor,  # [B, L, E]
    attention_mask: Tensor | None = None,
    is_index_masked: Tensor | None = None,  # bool [B, L]
    is_index_global_attn: Tensor | None = None,  # bool [B, L]
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:  # [B, L, E]
    """As in transformers. Who sees what is in the two boolean masks; `attention_mask` says the same in numbers."""
    if output_attentions:
        warnings.warn(
            "output_attentions=True: transformers' own Longformer attention runs instead of the fused one, which does "
            "not store the weights",
            stacklevel=2,
        )
        stock = next(cls for cls in _FUSED if isinstance(self, cls))
        return stock.forward(
            self, hidden_states, attention_mask, is_index_masked, is_index_global_attn, is_global_attn, True
        )  # fmt: skip
    if is_index_masked is None and attention_mask is not None:
        is_index_masked = attention_mask < 0
    if is_index_global_attn is None and attention_mask is not None:
        is_index_global_attn = attention_mask > 0
    glob = None if is_global_attn is False else is_index_global_attn
    if is_index_masked is not None and not bool(is_index_masked.any()):
        is_index_masked = None
    return (attend(self, hidden_states, is_index_masked, glob, self.one_sided_attn_window_size),)


class FusedLongformerSelfAttention(LongformerSelfAttention):
    """transformers' LongformerSelfAttention on the fused kernels: same parameters, arguments and results."""

    forward = _forward


class FusedLEDEncoderSelfAttention(LEDEncoderSelfAttention):
    """transformers' LEDEncoderSelfAttention on the fused kernels: same parameters, arguments and results."""

    forward = _forward


_FUSED: dict[Any, type] = {
    LongformerSelfAttention: FusedLongformerSelfAttention,
    LEDEncoderSelfAttention: FusedLEDEncoderSelfAttention,
}


def fuse_longformer(model: torch.nn.Module) -> FuseReport:
    """Swap the self-attention of Longformer and of LED's encoder in `model` for the fused one, in place.

    The modules change class and stay the same objects: parameters, state_dict, hooks and optimizers need no care. Time
    and memory are linear in the length of a sequence, as before. Padded rows give 0, as before. With
    `output_attentions=True` transformers' own attention runs, with a warning.

    Returns:
        What was swapped, and what was left alone and why (modules of a subclass, or whose forward was replaced).

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fuse_longformer expects a torch.nn.Module, got {type(model).__name__}")
    report = FuseReport(model, "fuse_longformer")
    for name, module in model.named_modules():
        if not isinstance(module, tuple(_FUSED)):
            continue
        entry = Entry(name, type(module).__name__)
        if type(module) in _FUSED.values():
            report.unchanged.append(entry)
        elif type(module) not in _FUSED:
            report.skipped.append(entry._replace(reason="it is of a subclass and may rely on what a swap would change"))
        elif "forward" in module.__dict__:
            report.skipped.append(entry._replace(reason="its forward was replaced on the instance"))
        else:
            module.__class__ = _FUSED[type(module)]
            report.swapped.append(entry)
    return report
