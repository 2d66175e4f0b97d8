"""The Transformer's modules as cases, and their sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .attention_cases import TRAINING_PASSES
from .case import BYTES, Case, Goal, Set

FAMILIES = ("TransformerEncoderLayer", "MultiheadAttention")


@dataclass(frozen=True)
class TransformerCase(Case, kind="transformer"):
    """Self-attention over [B, L, d]: an encoder layer with 4 d features inside, or attention without its weights.

    Dropout acts in training, as it does in the modules.
    """

    B: int
    L: int
    d: int
    heads: int
    dropout: float = 0.0

    @property
    def layer(self) -> bool:
        return self.family == "TransformerEncoderLayer"

    def sizes(self) -> list[str]:
        dropout = f"dropout{self.dropout:g}" if self.dropout else ""
        return [f"B{self.B} L{self.L} d{self.d} H{self.heads}", dropout]

    def weights(self) -> int:
        """Elements of the matrices: four projections, and the two of the feed-forward network."""
        return (4 + (8 if self.layer else 0)) * self.d * self.d

    def operations(self) -> int:
        projections, attention = 2 * self.B * self.L * self.weights(), 4 * self.B * self.L * self.L * self.d
        if self.mode == "training":
            return int(3 * projections + TRAINING_PASSES * attention)
        return projections + attention

    def compulsory_bytes(self) -> int:
        values = 2 * self.B * self.L * self.d + self.weights()
        return values * BYTES[self.dtype] * (2 if self.mode == "training" else 1)

    def tiny(self) -> TransformerCase:
        return self.but(B=2, L=4, d=8 * self.heads)


def _every(family: str, sizes: list[tuple[int, int, int]]) -> Iterator[Case]:
    for mode in ("training", "inference"):
        for B, L, d in sizes:
            yield TransformerCase(family, mode, B, L, d, d // 64, dropout=0.1 if mode == "training" else 0.0)


def _layers() -> Iterator[Case]:
    sizes = [(32, 96, 128), (8, 512, 128), (16, 128, 256), (4, 512, 256), (8, 128, 512), (2, 512, 512)]
    return _every("TransformerEncoderLayer", sizes)


def _attention() -> Iterator[Case]:
    return _every("MultiheadAttention", [(16, 128, 256), (4, 512, 256), (8, 128, 512), (2, 512, 512)])


def quick() -> Iterator[Case]:
    yield TransformerCase("TransformerEncoderLayer", "training", 16, 128, 256, 4, dropout=0.1)


def smoke() -> Iterator[Case]:
    for family in FAMILIES:
        yield from (TransformerCase(family, mode, 2, 5, 16, 2) for mode in ("inference", "training"))
        yield TransformerCase(family, "training", 2, 5, 16, 2, dropout=0.1)


SETS: dict[str, Set] = {
    "encoder-layer": Set(
        "TransformerEncoderLayer, d = 128 to 512; dropout 0.1 in training", _layers, goal=Goal(training=1.4)
    ),
    "mha": Set("MultiheadAttention, d = 256, 512; dropout 0.1 in training", _attention, goal=Goal()),
}
