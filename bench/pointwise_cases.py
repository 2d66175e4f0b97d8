"""The pointwise part of one step as cases: from the pre-activations of the gates to the states, or back.

What limits it is memory, so what it is compared with is a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .case import BYTES, Case

FAMILIES = ("LSTMPointwise", "GRUPointwise")
CELL = {"LSTMPointwise": "lstm", "GRUPointwise": "gru"}


@dataclass(frozen=True)
class PointwiseCase(Case, kind="pointwise"):
    """Inference: h' (and c') from both products of the gates. Training: their gradients from those of the states."""

    native_gpu: ClassVar[str] = "torch"

    B: int
    H: int

    @property
    def cell(self) -> str:
        return CELL[self.family]

    @property
    def gates(self) -> int:
        return 4 if self.cell == "lstm" else 3

    def sizes(self) -> list[str]:
        return [f"B{self.B} H{self.H}"]

    def operations(self) -> int:
        return 0

    def compulsory_bytes(self) -> int:
        """Products and what is saved are float32, states and gradients in the dtype of the case."""
        half, cells = BYTES[self.dtype], self.B * self.H
        lstm = self.cell == "lstm"
        if self.mode == "inference":  # two products; the state before, those after
            return cells * (2 * self.gates * 4 + (3 if lstm else 2) * half)
        # Five or four saved values; LSTM: c, dh, dc, four gradients, dc before; GRU: h, dh, four, and dh in float32
        return cells * ((5 if lstm else 4) * 4 + (8 if lstm else 6) * half + (0 if lstm else 4))

    def tiny(self) -> PointwiseCase:
        return self.but(B=3, H=5)


def device() -> Iterator[PointwiseCase]:
    """Of more memory than any cache has; all of them run on the CUDA and Triton kernels, so they are for a GPU."""
    for family in FAMILIES:
        for mode in ("inference", "training"):
            yield PointwiseCase(family, mode, 16384, 2048, dtype="bfloat16", device="cuda")
