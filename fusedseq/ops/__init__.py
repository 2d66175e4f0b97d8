"""The operators: validated, differentiable, and known to torch.compile, autocast and torch.func."""

from __future__ import annotations

from fusedseq.ops.attention import attention, attention_probs
from fusedseq.ops.bias_activation import bias_activation_dropout
from fusedseq.ops.check import ArgumentTypeError, ArgumentValueError
from fusedseq.ops.frozen import Frozen
from fusedseq.ops.layer_norm import residual_dropout_layer_norm
from fusedseq.ops.mask import Mask
from fusedseq.ops.repeat import Repeat, prepare
from fusedseq.ops.scan import cell, scan
from fusedseq.ops.sdpa import scaled_dot_product_attention

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "Frozen",
    "Mask",
    "Repeat",
    "attention",
    "attention_probs",
    "bias_activation_dropout",
    "cell",
    "prepare",
    "residual_dropout_layer_norm",
    "scaled_dot_product_attention",
    "scan",
]
