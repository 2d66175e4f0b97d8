"""The recurrent sizes of DeepBench (github.com/baidu-research/DeepBench, code/kernels/{rnn,inference}_problems.h).

Its input size equals the hidden size throughout, and its `vanilla` is our RNN.
"""

from __future__ import annotations

from collections.abc import Iterator

Size = tuple[str, int, int, int]  # family, H, B, T
Row = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # family, Hs, Bs, Ts: every combination

TRAINING: tuple[Row, ...] = (
    ("RNN", (1760, 2048, 2560), (16, 32, 64, 128), (50,)),
    ("LSTM", (256,), (16, 32, 64), (150,)),
    ("LSTM", (512, 1024, 2048, 4096), (16, 32, 64, 128), (25,)),
    ("LSTM", (1536,), (8, 16, 32), (50,)),
    ("GRU", (512,), (32,), (1,)),
    ("GRU", (1024,), (32, 64), (1500,)),
    ("GRU", (1536, 2048, 2560, 2816), (32,), (187, 375, 750, 1500)),
)

INFERENCE: tuple[Row, ...] = (
    ("LSTM", (256,), (1, 2, 4), (150,)),
    ("LSTM", (512, 1024, 2048), (1, 2, 4), (25,)),
    ("LSTM", (1536,), (1, 2, 4), (50,)),
    ("GRU", (512,), (1, 2, 4), (1,)),
    ("GRU", (1024,), (1, 2, 4), (1500,)),
    ("GRU", (1536, 2048, 2560, 2816), (1, 2, 4), (187, 375, 750, 1500)),
)

DEVICE: tuple[Row, ...] = (
    ("RNN", (32,), (1,), (672,)),
    ("RNN", (64,), (1,), (96,)),
    ("LSTM", (256,), (1,), (150,)),
)


def sizes(rows: tuple[Row, ...]) -> Iterator[Size]:
    for family, hidden, batch, steps in rows:
        for H in hidden:
            for B in batch:
                for T in steps:
                    yield family, H, B, T
