"""Fused sequence kernels for PyTorch: drop-in replacements for torch.nn's recurrent and Transformer layers."""

from __future__ import annotations

# torch comes first: it brings libgomp into the process, and the compiled core then shares that one thread pool.
import torch as _torch  # noqa: F401

from fusedseq.nn import (
    GRU,
    LSTM,
    RNN,
    GRUCell,
    LongformerSelfAttention,
    LSTMCell,
    MultiheadAttention,
    RNNCell,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    freeze,
    fuse,
    unfreeze,
    unfuse,
)
from fusedseq.ops import (
    Mask,
    attention,
    attention_probs,
    bias_activation_dropout,
    residual_dropout_layer_norm,
    scaled_dot_product_attention,
)
from fusedseq.registry import explain, use_backend

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LongformerSelfAttention",
    "Mask",
    "MultiheadAttention",
    "RNNCell",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "attention",
    "attention_probs",
    "bias_activation_dropout",
    "explain",
    "freeze",
    "fuse",
    "residual_dropout_layer_norm",
    "scaled_dot_product_attention",
    "unfreeze",
    "unfuse",
    "use_backend",
]
