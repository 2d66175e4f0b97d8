"""Fused sequence kernels for PyTorch: drop-in replacements for torch.nn's recurrent layers."""

from __future__ import annotations

# torch comes first: it brings libgomp into the process, and the compiled core then shares that one thread pool.
import torch as _torch  # noqa: F401

from fusedseq.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, freeze, fuse, unfreeze, unfuse
from fusedseq.registry import explain, use_backend

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "explain",
    "freeze",
    "fuse",
    "unfreeze",
    "unfuse",
    "use_backend",
]
