"""Recurrent modules and cells as cases, and their sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from . import deepbench
from .case import BYTES, Case, Set

SEQUENCES = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
FAMILIES = SEQUENCES + CELLS
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class RecurrentCase(Case, kind="rnn"):
    """A recurrent module or cell. `packed` rows have lengths from T/4 to T and come as a PackedSequence."""

    native_gpu: ClassVar[str] = "cudnn"

    B: int
    T: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    packed: bool = False

    def sizes(self) -> list[str]:
        return [
            f"B{self.B}" if self.cell else f"B{self.B} T{self.T}",
            f"I{self.I} H{self.H}",
            f"R{self.proj}" if self.proj else "",
            f"L{self.layers}" if self.layers > 1 else "",
            "bi" if self.bidirectional else "",
            "packed" if self.packed else "",
        ]

    @property
    def cell(self) -> bool:
        return self.family in CELLS

    @property
    def gates(self) -> int:
        return GATES[self.family.removesuffix("Cell")]

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def R(self) -> int:
        return self.proj or self.H

    def lengths(self) -> list[int]:
        """Steps of each row: spread evenly over T/4 to T, in an order that is not sorted."""
        if not self.packed:
            return [self.T] * self.B
        low = max(1, self.T // 4)
        even = [self.T - (self.T - low) * b // max(1, self.B - 1) for b in range(self.B)]
        return even[::2] + even[1::2]

    def weights(self) -> list[tuple[int, int]]:
        """Rows and columns of the matrices that multiply a state or an input, of all layers and directions."""
        shapes = []
        for layer in range(self.layers):
            inputs = self.I if layer == 0 else self.D * self.R
            shapes += [(self.gates * self.H, inputs), (self.gates * self.H, self.R)] * self.D
            shapes += [(self.R, self.H)] * self.D if self.proj else []
        return shapes

    def operations(self) -> int:
        """Training counts three times a forward pass."""
        rows = sum(self.lengths())
        products = 2 * rows * sum(m * n for m, n in self.weights())
        return products * (3 if self.mode == "training" else 1)

    def compulsory_bytes(self) -> int:
        rows = sum(self.lengths())
        values = rows * (self.I + self.D * self.R) + sum(m * n for m, n in self.weights())
        return values * BYTES[self.dtype] * (2 if self.mode == "training" else 1)

    def traffic(self) -> float:
        """Of the weights, read at every step."""
        return self.T * BYTES[self.dtype] * sum(m * n for m, n in self.weights())

    def tiny(self) -> RecurrentCase:
        return self.but(B=2, T=1 if self.T == 1 else 2, I=2, H=8, layers=1, proj=4 if self.proj else 0)


def _every(
    sizes: Sequence[dict[str, Any]],
    families: Sequence[str] = SEQUENCES,
    modes: Sequence[str] = ("inference", "training"),
) -> Iterator[Case]:
    for family in families:
        for mode in modes:
            for size in sizes:
                yield RecurrentCase(family, mode, **size)


def _sizes(*sizes: tuple[int, int, int, int], **more: Any) -> list[dict[str, Any]]:
    return [dict(B=B, T=T, I=I, H=H, **more) for B, T, I, H in sizes]


def _grid() -> Iterator[Case]:
    sizes = _sizes((1, 100, 64, 128), (1, 256, 256, 256), (16, 100, 64, 128), (64, 50, 256, 256), (32, 128, 512, 512))
    return _every(sizes)


def _deepbench(rows: tuple[deepbench.Row, ...], mode: str) -> Iterator[Case]:
    for family, H, B, T in deepbench.sizes(rows):
        yield RecurrentCase(family, mode, B, T, H, H)


def _cells() -> Iterator[Case]:
    return _every(_sizes(*((B, 1, H, H) for H in (64, 256, 512) for B in (1, 16))), CELLS)


def _packed() -> Iterator[Case]:
    return _every(_sizes((16, 100, 64, 128), (32, 200, 256, 256), packed=True))


def _threads() -> Iterator[Case]:
    sizes = _sizes((1, 256, 256, 256), (16, 100, 64, 128), (64, 50, 256, 256))
    return (case.but(threads=threads) for case in _every(sizes) for threads in (1, 2))


def quick() -> Iterator[Case]:
    """One case of most sets, so that the default run sees every regime."""
    yield RecurrentCase("LSTM", "training", 64, 96, 8, 128, layers=2)
    yield RecurrentCase("GRU", "training", 16, 128, 256, 256)
    yield RecurrentCase("LSTM", "inference", 16, 400, 80, 256, layers=3, bidirectional=True, packed=True)
    yield RecurrentCase("LSTM", "inference", 16, 100, 256, 512, proj=256)
    yield RecurrentCase("LSTM", "training", 32, 200, 256, 256, packed=True)
    yield RecurrentCase("LSTM", "streaming", 1, 1, 256, 256)
    yield RecurrentCase("GRU", "streaming", 1, 1, 64, 64)
    yield RecurrentCase("LSTMCell", "inference", 1, 1, 256, 256)
    yield RecurrentCase("GRUCell", "training", 16, 1, 256, 256)
    yield RecurrentCase("LSTM", "inference", 1, 25, 1024, 1024)
    yield RecurrentCase("LSTM", "training", 32, 25, 512, 512)


def smoke() -> Iterator[Case]:
    sizes = _sizes((2, 3, 4, 8)) + _sizes((2, 4, 4, 8), packed=True)
    yield from _every(sizes)
    yield RecurrentCase("LSTM", "inference", 2, 3, 4, 8, proj=5)
    yield RecurrentCase("GRU", "inference", 2, 3, 4, 8, layers=2, bidirectional=True)
    yield from _every(_sizes((1, 1, 4, 8)), modes=("streaming",))
    yield from _every(_sizes((2, 1, 4, 8)), CELLS)


SETS: dict[str, Set] = {
    "grid": Set("five sizes, small to large, of every family", _grid),
    "deepbench-training": Set("DeepBench, training", lambda: _deepbench(deepbench.TRAINING, "training")),
    "deepbench-inference": Set("DeepBench, server inference", lambda: _deepbench(deepbench.INFERENCE, "inference")),
    "deepbench-device": Set("DeepBench, inference at the edge", lambda: _deepbench(deepbench.DEVICE, "inference")),
    "forecasting": Set("two layers, short windows", lambda: _every(_sizes((64, 96, 8, 128), layers=2))),
    "speech": Set(
        "encoder: both directions, three layers, rows of different lengths",
        lambda: _every(_sizes((16, 400, 80, 256), layers=3, bidirectional=True, packed=True)),
    ),
    "rl": Set("recurrent policies", lambda: _every(_sizes((16, 128, 256, 256)))),
    "streaming": Set(
        "one step at a time with the state carried over",
        lambda: _every(_sizes(*((1, 1, H, H) for H in (64, 128, 256, 512))), modes=("streaming",)),
    ),
    "charlm": Set("character language model", lambda: _every(_sizes((32, 256, 128, 512)))),
    "cells": Set("LSTMCell, GRUCell, RNNCell", _cells),
    "projection": Set(
        "LSTM with proj_size",
        lambda: _every(_sizes((16, 100, 256, 512), (16, 100, 256, 1024), (1, 100, 256, 1024), proj=256), ("LSTM",)),
    ),
    "packed": Set("rows of lengths T/4 to T, beside our own padded run", _packed),
    "scaling-T": Set("growth over T", lambda: _every(_sizes(*((4, 4**n, 64, 64) for n in range(3, 8))))),
    "scaling-B": Set("growth over B", lambda: _every(_sizes(*((4**n, 64, 128, 128) for n in range(5))))),
    "scaling-H": Set("growth over H", lambda: _every(_sizes(*((16, 64, 2**n, 2**n) for n in range(6, 11))))),
    "threads": Set("one thread and two", _threads),
}
