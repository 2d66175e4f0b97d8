"""Calls of attention as cases, and their sets: a set is a row of the table of goals in docs/attention.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .case import BYTES, Case, Goal, Set

FAMILIES = ("attention",)
# The two products of the forward pass, and the five of a backward pass that has stored no probabilities (scores again,
# then the gradients of values, probabilities, queries and keys), in units of the forward pass.
TRAINING_PASSES = 3.5


@dataclass(frozen=True)
class AttentionCase(Case, kind="attention"):
    """One call. `window` keys are seen by each query, itself the last of them if `causal`, else in their middle.
    Besides them it sees the first `global_keys` keys, as Longformer's queries do.

    `lengths`: each batch row has keys of its own number. `bias`: a table [H, L, S] is added to the logits, and trained.
    """

    B: int
    H: int
    L: int
    E: int
    S: int = 0  # keys; 0: L
    K: int = 0  # key heads; 0: H
    causal: bool = False
    window: int = 0  # 0: none
    dropout: float = 0.0
    lengths: bool = False
    bias: bool = False
    global_keys: int = 0

    @property
    def keys(self) -> int:
        return self.S or self.L

    @property
    def key_heads(self) -> int:
        return self.K or self.H

    def sizes(self) -> list[str]:
        return [
            f"B{self.B} H{self.H}",
            f"K{self.K}" if self.K else "",
            f"L{self.L}",
            f"S{self.S}" if self.S else "",
            f"E{self.E}",
            f"window{self.window}" if self.window else "causal" if self.causal else "",
            f"global{self.global_keys}" if self.global_keys else "",
            "lengths" if self.lengths else "",
            "bias" if self.bias else "",
            f"dropout{self.dropout:g}" if self.dropout else "",
        ]

    def reach(self) -> tuple[int, int]:
        """Keys that a query sees before and after its own; past all of them where nothing bounds it."""
        far = self.L + self.keys
        if self.causal:
            return (self.window - 1 if self.window else far), 0
        return (self.window // 2, self.window // 2) if self.window else (far, far)

    def key_lengths(self) -> list[int]:
        """Keys of each batch row: from half to all of them, evenly; a single row has three quarters."""
        if not self.lengths:
            return [self.keys] * self.B
        if self.B == 1:
            return [max(1, 3 * self.keys // 4)]
        return [max(1, self.keys // 2 + (self.keys - self.keys // 2) * b // (self.B - 1)) for b in range(self.B)]

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head in all batch rows."""
        found = dict.fromkeys(self.key_lengths(), 0)
        before, after = self.reach()
        for keys in found:
            if not self.causal and not self.window:
                found[keys] = self.L * keys
                continue
            for i in range(self.L):
                first, last = max(0, i - before), min(i + after + 1, keys)
                found[keys] += max(0, last - first) + min(self.global_keys, first)
        return sum(found[keys] for keys in self.key_lengths())

    def operations(self) -> int:
        passes = TRAINING_PASSES if self.mode == "training" else 1
        return int(passes * 4 * self.H * self.E * self.pairs())

    def compulsory_bytes(self) -> int:
        values = 2 * self.B * self.E * (self.H * self.L + self.key_heads * self.keys)
        table = self.H * self.L * self.keys if self.bias else 0
        return (values + table) * BYTES[self.dtype] * (2 if self.mode == "training" else 1)

    def tiny(self) -> AttentionCase:
        few = 1 if self.L == 1 else 8
        return self.but(
            B=2 if self.lengths else 1,
            L=few,
            S=8 if self.S else 0,
            window=min(self.window, 4),
            global_keys=min(self.global_keys, 2),
        )


def _both(*sizes: dict[str, Any]) -> Iterator[Case]:
    for mode in ("inference", "training"):
        for size in sizes:
            yield AttentionCase("attention", mode, **size)


def _sizes(*sizes: tuple[int, int, int, int], **more: Any) -> list[dict[str, Any]]:
    return [dict(B=B, H=H, L=L, E=E, **more) for B, H, L, E in sizes]


def _full() -> Iterator[Case]:
    return _both(*_sizes((1, 8, 2048, 64), (1, 4, 2048, 128), (1, 2, 4096, 64), (1, 1, 4096, 128)))


def _causal() -> Iterator[Case]:
    return _both(*_sizes(*((2, 8, L, 64) for L in (128, 256, 512)), (2, 4, 512, 128), causal=True))


def _short() -> Iterator[Case]:
    return _both(
        *_sizes((4, 8, 128, 64), (4, 8, 64, 32), (8, 8, 32, 64), (2, 4, 128, 128), (1, 8, 1024, 32), (2, 8, 256, 16))
    )


def _dropout() -> Iterator[Case]:
    sizes = _sizes((32, 4, 128, 64), (8, 4, 512, 64), (2, 4, 2048, 64), dropout=0.1)
    # A model in evaluation has no dropout.
    return (case for case in _both(*sizes) if case.mode == "training")


def _window() -> Iterator[Case]:
    return _both(*_sizes((1, 4, 4096, 64), (1, 1, 16384, 64), causal=True, window=256))


def _bfloat16() -> Iterator[Case]:
    return _both(*_sizes((1, 8, 512, 32), (4, 8, 128, 64), (1, 8, 1024, 64), (1, 8, 1024, 128)))


def _decode() -> Iterator[Case]:
    for B, H, E in ((1, 8, 64), (4, 32, 128)):
        for S in (512, 4096):
            yield AttentionCase("attention", "inference", B, H, 1, E, S=S, K=H // 8)


def _growth() -> Iterator[Case]:
    return _both(*_sizes(*((1, 4, 2**n, 64) for n in range(6, 14))))


def _memory() -> Iterator[Case]:
    for dropout in (0.0, 0.1):
        for n in range(8, 14):
            yield AttentionCase("attention", "training", 1, 4, 2**n, 64, dropout=dropout)


def _gpu() -> Iterator[Case]:
    """16384 tokens of 2048 features, as FlashAttention's figures have it: 32 heads of 64, or 16 of 128."""
    for causal in (False, True):
        for L in (512, 2048, 16384):
            sizes = ((16384 // L, 2048 // E, L, E) for E in (64, 128))
            yield from _both(*_sizes(*sizes, causal=causal))


def _gpu_more() -> Iterator[Case]:
    """Of each kind one size of 16384 tokens and more, for heads of 64 and 128."""
    for E in (128, 64):
        H = 2048 // E
        long, middle, short = (2, H, 8192, E), (4, H, 4096, E), (4, H, 2048, E)
        yield from _both(*_sizes(long, causal=True, window=512))
        yield from _both(*_sizes(long, window=512, global_keys=64))
        yield from _both(*_sizes(middle, lengths=True))
        yield from _both(*_sizes(short, bias=True))
        yield from (case for case in _both(*_sizes(short, causal=True, dropout=0.1)) if case.mode == "training")
    yield from _both(*_sizes((2, 16, 8192, 128), causal=True, K=2))
    for S in (4096, 65536):
        yield AttentionCase("attention", "inference", 8, 32, 1, 128, S=S, K=4)


def quick() -> Iterator[Case]:
    yield AttentionCase("attention", "inference", 1, 8, 2048, 64)
    yield AttentionCase("attention", "training", 2, 8, 256, 64, causal=True)
    yield AttentionCase("attention", "training", 8, 4, 512, 64, dropout=0.1)
    yield AttentionCase("attention", "inference", 1, 4, 4096, 64, causal=True, window=256)
    yield AttentionCase("attention", "inference", 1, 8, 1, 64, S=4096, K=1)


def smoke() -> Iterator[Case]:
    yield from _both(*_sizes((2, 4, 6, 8)), *_sizes((1, 2, 9, 8), causal=True))
    yield from _both(*_sizes((1, 4, 12, 8), K=2, causal=True, window=4))
    yield from _both(*_sizes((1, 2, 12, 8), window=4, global_keys=2))
    yield AttentionCase("attention", "training", 2, 2, 6, 8, dropout=0.1)
    yield AttentionCase("attention", "inference", 2, 4, 1, 8, S=16, K=1)


SETS: dict[str, Set] = {
    "attention-full": Set("every key seen, E = 64, 128, L >= 2048", _full, goal=Goal(1.1, 1.1)),
    "attention-causal": Set("causal, L <= 512", _causal, goal=Goal(1.8, 1.5)),
    "attention-short": Set("L <= 128 or E <= 32", _short, goal=Goal(1.5, 1.5)),
    "attention-dropout": Set("dropout 0.1, L = 128, 512, 2048", _dropout, goal=Goal(training=2.0)),
    "attention-window": Set(
        "window 256 of L = 4096, 16384", _window, goal=Goal(0.6, 0.6, lambda case: case.L / case.window, "L/W")
    ),
    "attention-bf16": Set("bfloat16, E >= 32", _bfloat16, dtype="bfloat16", goal=Goal(1.5, 1.5)),
    "attention-decode": Set("decode: L = 1, S = 512, 4096, GQA 8:1", _decode, goal=Goal(1.5)),
    "attention-gpu": Set("full and causal, E = 64, 128, L = 512 to 16384, for a GPU", _gpu, dtype="bfloat16"),
    "attention-gpu-more": Set(
        "window, lengths, bias, grouped heads, dropout, decoding, for a GPU", _gpu_more, dtype="bfloat16"
    ),
    "attention-memory": Set("peak memory over L, for `fusedseq bench memory`", _memory),
    "scaling-L": Set("growth of attention over L", _growth),
}
