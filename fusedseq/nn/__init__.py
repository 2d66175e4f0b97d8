"""Modules that stand in for their torch.nn namesakes, and `fuse`, which puts them into an existing model."""

from __future__ import annotations

from fusedseq.nn import dynamo
from fusedseq.nn.attention import MultiheadAttention
from fusedseq.nn.cells import GRUCell, LSTMCell, RNNCell
from fusedseq.nn.freeze import freeze, unfreeze
from fusedseq.nn.fuse import FuseReport, fuse, unfuse
from fusedseq.nn.longformer import LongformerSelfAttention
from fusedseq.nn.rnn import GRU, LSTM, RNN
from fusedseq.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "FuseReport",
    "GRUCell",
    "LSTMCell",
    "LongformerSelfAttention",
    "MultiheadAttention",
    "RNNCell",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "freeze",
    "fuse",
    "unfreeze",
    "unfuse",
]

dynamo.install()
