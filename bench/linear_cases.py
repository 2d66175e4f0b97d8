"""Linear layers over all positions as cases, and their set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .case import BYTES, Case, Goal, Set

FAMILIES = ("Linear",)


@dataclass(frozen=True)
class LinearCase(Case, kind="linear"):
    """x [M, K] times the transposed weight [N, K], plus the bias: the products of a Transformer's layer."""

    M: int
    N: int
    K: int

    def sizes(self) -> list[str]:
        return [f"M{self.M} N{self.N} K{self.K}"]

    def operations(self) -> int:
        return (3 if self.mode == "training" else 1) * 2 * self.M * self.N * self.K

    def compulsory_bytes(self) -> int:
        values = self.M * (self.N + self.K) + self.N * self.K
        return values * BYTES[self.dtype] * (2 if self.mode == "training" else 1)

    def tiny(self) -> LinearCase:
        return self.but(M=256, N=48, K=64)  # small as it is, it does not go to torch


def _layers() -> Iterator[Case]:
    """Of d = 128 to 512: q, k and v in one, the output, and both of the feed-forward network."""
    for mode in ("inference", "training"):
        for M, d in ((3072, 128), (2048, 256), (1024, 512)):
            for N, K in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d)):
                yield LinearCase("Linear", mode, M, N, K)


def quick() -> Iterator[Case]:
    yield LinearCase("Linear", "inference", 2048, 768, 256)


def smoke() -> Iterator[Case]:
    yield from (LinearCase("Linear", mode, 256, 48, 64) for mode in ("inference", "training"))


SETS: dict[str, Set] = {
    "linear": Set("Linear layers of a Transformer, d = 128 to 512", _layers, goal=Goal()),
}
