"""Scan cases as text, and the tensors that go with them.

A case is written as its sizes and a few words, `T7B3I5H33-bi-packed`. Text, cell and dtype make the test id, and the id
is all that is needed to have the same tensors again:

    make_inputs(Case.parse("lstm", "T7B3I5H33-bi-packed"), torch.float32)

The words:
    bi              both directions
    bf              batch first
    nobias          no biases
    proj<n>         LSTM with recurrent projection to n
    lengths         padded, each row with a length of its own, 1 to T
    lengths0        the same, with rows of length 0 among them
    packed          packed rows, as in a PackedSequence
    resets          a random reset mask
    cells           the cell state of every step is an output too (LSTM)
    nostate         no initial states
    permuted        inputs and upstream gradients are views with permuted strides
    sliced          inputs and upstream gradients are strided slices of larger buffers, with NaN between their elements
    expanded        inputs and upstream gradients have a dimension of stride 0
    x<n>            the inputs are n times larger, which saturates the gates
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}
CELLS = tuple(GATES)
LAYOUTS = ("dense", "lengths", "lengths0", "packed")
VIEWS = ("contiguous", "permuted", "sliced", "expanded")

# Small enough for every dtype, ISA and emulator; between them they use every word.
COMPACT = """
T1B1I1H1
T7B3I5H33-bi-packed
T4B7I3H17-bi-bf-lengths0-resets
T3B8I16H64-cells-nostate
T5B13I2H31-nobias-resets-permuted
T6B4I17H24-bi-proj7-lengths-cells-sliced
T9B5I1H13-packed-resets-cells-nobias
T2B6I33H8-bf-expanded-proj3
T5B3I7H48-bi-nostate-x30
T0B3I4H5-bi-cells
T3B0I4H5
T4B2I0H9-bi
"""

# Together with the compact ones every two values of two words meet at least once.
FULL = """
T1B37I3H65-bi
T2B1I7H128-nobias-cells
T1B1I64H96-proj32
T13B2I31H7-bi-bf-nobias-sliced
T3B16I8H16-packed
T5B9I5H47-bf-resets-nostate-expanded
T11B3I13H3-lengths-resets-cells-proj2-permuted
T4B24I6H40-bi-lengths-nobias-nostate
T3B53I19H37-resets
T8B4I32H32-packed-cells-proj11-nostate-sliced
T6B12I9H72-bf-lengths-cells-x30
T33B2I2H19-bi-packed-resets-proj5-permuted
T5B6I4H80-lengths0-nobias-cells-permuted
T7B11I15H11-bi-bf-lengths0-proj4-nostate-sliced
T3B5I3H100-lengths0-resets-expanded
T10B7I6H23-packed-nostate-expanded
T6B1I4H29-bi-packed-nobias-cells-resets
T3B3I3H37-bf-lengths-nobias-expanded
T2B19I1H56-bf-resets-cells-nobias-proj8-permuted
T9B2I5H1-bi-cells-resets-expanded
T4B4I4H4-lengths-resets-nostate
T17B5I8H27-nobias-proj13-nostate-resets-sliced
T3B10I11H6-bf-nostate-permuted-cells
T12B3I2H21-lengths0-proj9-bi-nobias-expanded
T150B2I3H34-bi-lengths-cells
T2B3I5H261-bi-resets
T1B2I3H4-lengths0-nostate-permuted
T0B2I3H4-nobias-nostate
T0B0I3H4-bf
T2B0I3H4-bi-bf-nobias-lengths-cells
T2B3I0H4-bf-nobias-nostate
T5B3I0H6-packed-resets-cells
T4096B2I3H5-bi
"""


@dataclass(frozen=True)
class Case:
    """One scan call, but for its dtype and device."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    proj: int = 0
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    layout: str = "dense"
    resets: bool = False
    cells: bool = False
    state: bool = True
    view: str = "contiguous"
    scale: int = 1

    @classmethod
    def parse(cls, cell: str, text: str) -> Case:
        """Read the notation of this module; words that mean nothing to the cell are dropped."""
        sizes, *words = text.split("-")
        found = re.fullmatch(r"T(\d+)B(\d+)I(\d+)H(\d+)", sizes)
        if found is None:
            raise ValueError(f"unknown sizes {sizes!r} in the case {text!r}")
        T, B, I, H = map(int, found.groups())
        case = cls(cell, T, B, I, H)
        flags: dict[str, dict[str, Any]] = {
            "bi": {"bidirectional": True},
            "bf": {"batch_first": True},
            "nobias": {"bias": False},
            "resets": {"resets": True},
            "cells": {"cells": cell == "lstm"},
            "nostate": {"state": False},
        }
        for word in words:
            if word in flags:
                case = replace(case, **flags[word])
            elif word in LAYOUTS:
                case = replace(case, layout=word)
            elif word in VIEWS:
                case = replace(case, view=word)
            elif match := re.fullmatch(r"(proj|x)(\d+)", word):
                n = int(match[2])
                case = replace(case, scale=n) if match[1] == "x" else replace(case, proj=n if cell == "lstm" else 0)
            else:
                raise ValueError(f"unknown word {word!r} in the case {text!r}")
        return case

    @property
    def R(self) -> int:
        return self.proj or self.H

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    def __str__(self) -> str:
        words = [
            f"T{self.T}B{self.B}I{self.I}H{self.H}",
            "bi" if self.bidirectional else "",
            "bf" if self.batch_first else "",
            "" if self.bias else "nobias",
            f"proj{self.proj}" if self.proj else "",
            "" if self.layout == "dense" else self.layout,
            "resets" if self.resets else "",
            "cells" if self.cells else "",
            "" if self.state else "nostate",
            "" if self.view == "contiguous" else self.view,
            "" if self.scale == 1 else f"x{self.scale}",
        ]
        return "-".join(word for word in words if word)

    def id(self, dtype: torch.dtype) -> str:
        """Such as `lstm-f32-T7B3I5H33-bi-packed`."""
        return f"{self.cell}-{short(dtype)}-{self}"


def short(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def cases(cell: str, dtype: torch.dtype) -> list[Case]:
    """The cases of one row of the parity matrix: all of them in float32, the compact ones in every other dtype."""
    texts = COMPACT.split() + (FULL.split() if dtype == torch.float32 else [])
    return list(dict.fromkeys(Case.parse(cell, text) for text in texts))


def compact_cases(cell: str) -> list[Case]:
    return list(dict.fromkeys(Case.parse(cell, text) for text in COMPACT.split()))


@dataclass
class Inputs:
    """The arguments of a scan and one upstream gradient for each of its outputs."""

    case: Case
    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    lengths: Tensor | None
    batch_sizes: Tensor | None
    resets: Tensor | None
    upstream: dict[str, Tensor] = field(default_factory=dict)  # y, h_n, c_n, c_all, those that the case has

    def keywords(self) -> dict[str, object]:
        """The keyword arguments of the scan that differ from its defaults."""
        case = self.case
        options = {
            "bidirectional": case.bidirectional,
            "batch_first": case.batch_first,
            "lengths": self.lengths,
            "batch_sizes": self.batch_sizes,
            "resets": self.resets,
            "cells": case.cells,
        }
        return {name: value for name, value in options.items() if value is not None and value is not False}

    def weight_names(self) -> list[str]:
        names = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if self.case.bias else []), *(["w_hr"] if self.case.proj else [])]
        return [name + suffix for suffix in ("", "_reverse")[: self.case.D] for name in names]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values, contiguous, in another dtype."""

        def cast(t: Tensor) -> Tensor:
            return t.detach().to("cpu", dtype, memory_format=torch.contiguous_format, copy=True)

        return replace(
            self,
            x=cast(self.x),
            h0=None if self.h0 is None else cast(self.h0),
            c0=None if self.c0 is None else cast(self.c0),
            weights=[cast(w) for w in self.weights],
            resets=None if self.resets is None else self.resets.cpu(),
            upstream={name: cast(g) for name, g in self.upstream.items()},
        )


def _as_view(t: Tensor, view: str, dim: int = 0) -> Tensor:
    """The same shape behind unusual strides; only `expanded`, repeating the first slice of `dim`, changes values."""
    if view == "permuted":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if view == "sliced":
        buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
        out = buffer[..., 1::2]
        return out.copy_(t)
    if view == "expanded" and t.shape[dim]:
        return t.narrow(dim, 0, 1).expand_as(t)
    return t


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Inputs:
    """The tensors of a case: the same for every dtype up to rounding, and different for any two cases."""
    gen = torch.Generator().manual_seed(zlib.crc32(f"{case.cell}-{case}-{seed}".encode()))
    T, B, I, H, R, D, G = case.T, case.B, case.I, case.H, case.R, case.D, GATES[case.cell]

    def normal(*shape: int, dim: int = 0, scale: float = 1.0) -> Tensor:
        t = scale * torch.randn(shape, generator=gen, dtype=torch.float64)
        return _as_view(t.to(device, dtype), case.view, dim)

    def uniform(*shape: int) -> Tensor:
        t = (2 * torch.rand(shape, generator=gen, dtype=torch.float64) - 1) / H**0.5
        return _as_view(t.to(device, dtype), "contiguous" if case.view == "expanded" else case.view)

    lengths = batch_sizes = resets = None
    if case.layout == "packed":
        # One row lasts all T steps, as T is the length of the longest.
        ends = torch.randint(1, T + 1, (B,), generator=gen)
        ends[0] = T
        batch_sizes = (torch.arange(T).unsqueeze(1) < ends).sum(1)
        lead: tuple[int, ...] = (int(batch_sizes.sum()),)
    else:
        lead = (B, T) if case.batch_first else (T, B)
        if case.layout != "dense":
            lengths = torch.randint(1, T + 1, (B,), generator=gen)
            if case.layout == "lengths0":
                lengths[torch.randperm(B, generator=gen)[: (B + 2) // 3]] = 0
    if case.resets:
        resets = (torch.rand(lead, generator=gen) < 0.25).to(device)

    weights: list[Tensor] = []
    for _ in range(D):
        weights += [uniform(G * H, I), uniform(G * H, R)]
        weights += [uniform(G * H), uniform(G * H)] if case.bias else []
        weights += [uniform(R, H)] if case.proj else []
    lstm = case.cell == "lstm"
    upstream = {"y": normal(*lead, D * R), "h_n": normal(D, B, R, dim=1)}
    if lstm:
        upstream["c_n"] = normal(D, B, H, dim=1)
    if case.cells:
        upstream["c_all"] = normal(*lead, D * H)
    return Inputs(
        case=case,
        x=normal(*lead, I, scale=case.scale),
        h0=normal(D, B, R, dim=1) if case.state else None,
        c0=normal(D, B, H, dim=1) if case.state and lstm else None,
        weights=weights,
        lengths=lengths,
        batch_sizes=batch_sizes,
        resets=resets,
        upstream=upstream,
    )
