"""The executable specification: plain PyTorch, in any floating dtype, that imports nothing of ours.

Each family module states one step of its cells and the step's hand-written derivative; `scan` walks them over time.
"""

from __future__ import annotations

from . import attention, bias_activation, dropout, gru, layer_norm, lstm, rnn, scan

__all__ = ["attention", "bias_activation", "dropout", "gru", "layer_norm", "lstm", "rnn", "scan"]
