"""What is timed: one list of cases, in named sets. Whatever runs a benchmark takes its cases from here."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from . import deepbench

SEQUENCES = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
FAMILIES = SEQUENCES + CELLS
# Streaming is inference one step at a time, the state carried from call to call.
MODES = ("inference", "training", "streaming")
DTYPES = ("float32", "float64", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Beyond either, a call takes seconds on two cores: the operations, and the bytes of weights read again at every step.
# Such a case is meant for a GPU and is not run on a CPU unless asked for.
LARGE_OPERATIONS = 3e11
LARGE_TRAFFIC = 5e10


@dataclass(frozen=True)
class Case:
    """One thing to time. `packed` rows have lengths from T/4 to T and come as a PackedSequence."""

    family: str
    mode: str
    B: int
    T: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    packed: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0  # 0: torch's choice

    def __str__(self) -> str:
        words = [
            self.family,
            self.mode,
            f"B{self.B}" if self.cell else f"B{self.B} T{self.T}",
            f"I{self.I} H{self.H}",
            f"R{self.proj}" if self.proj else "",
            f"L{self.layers}" if self.layers > 1 else "",
            "bi" if self.bidirectional else "",
            "packed" if self.packed else "",
            "" if self.dtype == "float32" else self.dtype,
            "" if self.device == "cpu" else self.device,
            f"threads{self.threads}" if self.threads else "",
        ]
        return " ".join(word for word in words if word)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Case:
        """The case of a mapping such as `asdict` makes; what else is in the mapping is left alone."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def fields(self) -> dict[str, Any]:
        return asdict(self)

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

    @property
    def large(self) -> bool:
        traffic = self.T * BYTES[self.dtype] * sum(m * n for m, n in self.weights())
        return operations(self) > LARGE_OPERATIONS or traffic > LARGE_TRAFFIC

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


def operations(case: Case) -> int:
    """Floating-point operations of the matrix products; training counts three times a forward pass."""
    rows = sum(case.lengths())
    products = 2 * rows * sum(m * n for m, n in case.weights())
    return products * (3 if case.mode == "training" else 1)


def compulsory_bytes(case: Case) -> int:
    """What every implementation reads or writes once: input, output, weights; in training their gradients too."""
    rows = sum(case.lengths())
    values = rows * (case.I + case.D * case.R) + sum(m * n for m, n in case.weights())
    return values * BYTES[case.dtype] * (2 if case.mode == "training" else 1)


@dataclass(frozen=True)
class Set:
    about: str
    make: Callable[[], Iterable[Case]]


def _every(
    sizes: Sequence[dict[str, Any]],
    families: Sequence[str] = SEQUENCES,
    modes: Sequence[str] = ("inference", "training"),
) -> Iterator[Case]:
    for family in families:
        for mode in modes:
            for size in sizes:
                yield Case(family, mode, **size)


def _sizes(*sizes: tuple[int, int, int, int], **more: Any) -> list[dict[str, Any]]:
    return [dict(B=B, T=T, I=I, H=H, **more) for B, T, I, H in sizes]


def _grid() -> Iterator[Case]:
    sizes = _sizes((1, 100, 64, 128), (1, 256, 256, 256), (16, 100, 64, 128), (64, 50, 256, 256), (32, 128, 512, 512))
    return _every(sizes)


def _deepbench(rows: tuple[deepbench.Row, ...], mode: str) -> Iterator[Case]:
    for family, H, B, T in deepbench.sizes(rows):
        yield Case(family, mode, B, T, H, H)


def _cells() -> Iterator[Case]:
    return _every(_sizes(*((B, 1, H, H) for H in (64, 256, 512) for B in (1, 16))), CELLS)


def _packed() -> Iterator[Case]:
    return _every(_sizes((16, 100, 64, 128), (32, 200, 256, 256), packed=True))


def _threads() -> Iterator[Case]:
    sizes = _sizes((1, 256, 256, 256), (16, 100, 64, 128), (64, 50, 256, 256))
    return (replace(case, threads=threads) for case in _every(sizes) for threads in (1, 2))


def _quick() -> Iterator[Case]:
    """One case of most other sets, so that the default run sees every regime."""
    yield Case("LSTM", "training", 64, 96, 8, 128, layers=2)
    yield Case("GRU", "training", 16, 128, 256, 256)
    yield Case("LSTM", "inference", 16, 400, 80, 256, layers=3, bidirectional=True, packed=True)
    yield Case("LSTM", "inference", 16, 100, 256, 512, proj=256)
    yield Case("LSTM", "training", 32, 200, 256, 256, packed=True)
    yield Case("LSTM", "streaming", 1, 1, 256, 256)
    yield Case("GRU", "streaming", 1, 1, 64, 64)
    yield Case("LSTMCell", "inference", 1, 1, 256, 256)
    yield Case("GRUCell", "training", 16, 1, 256, 256)
    yield Case("LSTM", "inference", 1, 25, 1024, 1024)
    yield Case("LSTM", "training", 32, 25, 512, 512)


def _smoke() -> Iterator[Case]:
    sizes = _sizes((2, 3, 4, 8)) + _sizes((2, 4, 4, 8), packed=True)
    yield from _every(sizes)
    yield Case("LSTM", "inference", 2, 3, 4, 8, proj=5)
    yield Case("GRU", "inference", 2, 3, 4, 8, layers=2, bidirectional=True)
    yield from _every(_sizes((1, 1, 4, 8)), modes=("streaming",))
    yield from _every(_sizes((2, 1, 4, 8)), CELLS)


SETS: dict[str, Set] = {
    "grid": Set("five sizes, small to large, of every family", _grid),
    "quick": Set("one case of most other sets", _quick),
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
    "smoke": Set("tiny sizes of every kind, for tests", _smoke),
}
DEFAULT_SETS = ("grid", "quick")


def select(
    sets: Sequence[str] = DEFAULT_SETS,
    families: Sequence[str] = FAMILIES,
    modes: Sequence[str] = MODES,
    patterns: Sequence[str] = (),
    dtypes: Sequence[str] = ("float32",),
    devices: Sequence[str] = ("cpu",),
    threads: Sequence[int] = (0,),
) -> dict[Case, list[str]]:
    """The cases of the sets that meet every condition, each once, with the names of the sets that it is in.

    A pattern is part of the case as printed, or a shell pattern for all of it.
    """
    chosen: dict[Case, list[str]] = {}
    for name in sets:
        for case in SETS[name].make():
            for device in devices:
                for dtype in dtypes:
                    for number in threads:
                        one = replace(case, dtype=dtype, device=device, threads=case.threads or number)
                        if one.family in families and one.mode in modes and _matches(one, patterns):
                            names = chosen.setdefault(one, [])
                            if name not in names:
                                names.append(name)
    return chosen


def _matches(case: Case, patterns: Sequence[str]) -> bool:
    text = str(case).lower()
    return not patterns or any(p.lower() in text or fnmatch.fnmatchcase(text, p.lower()) for p in patterns)
