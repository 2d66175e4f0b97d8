"""Attention beside torch's: `python -m fusedseq.bench.attention_cases [--rows causal decode] [--flex] [--budget 0.5]`.

A row is one line of the table in docs/attention.md: some sizes, forward and forward + backward. Every peer is first
compared with the float64 truth by the rule of the tests, then timed in turns with the others; the ratio is that of the
fastest peer to ours, and a row's figure the geometric mean over its sizes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedseq
from fusedseq.reference.attention import TOP_LEFT, Problem, visible
from fusedseq.testing.attention_cases import AttentionCase, AttentionInputs
from fusedseq.testing.attention_compare import compare_with, evaluate_attention, judge_attention

from .timing import fma_peak, interleave

Attention = Callable[[Problem], tuple[Tensor, Tensor]]
# The truth holds all L x S logits in float64; larger cases are checked on their first positions.
CHECKED = 512
EAGER = 2**27  # logits that eager attention may hold


@dataclass(frozen=True)
class Case:
    B: int
    H: int
    L: int
    E: int
    S: int = 0  # 0: L
    K: int = 0  # key heads; 0: H
    causal: bool = False
    window: int = -1
    dropout: float = 0.0
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = f"B{self.B}H{self.H}K{self.K or self.H}L{self.L}S{self.S or self.L}E{self.E}"
        words = ["causal"] * self.causal + [f"window{self.window}"] * (self.window >= 0)
        return "-".join([sizes, *words, *([f"dropout{self.dropout}"] if self.dropout else []), self.dtype])

    def inputs(self) -> AttentionInputs:
        gen = torch.Generator().manual_seed(0)
        dtype, K, S = getattr(torch, self.dtype), self.K or self.H, self.S or self.L

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen).to(dtype)

        problem = Problem(
            normal(self.B, self.H, self.L, self.E), normal(self.B, K, S, self.E), normal(self.B, K, S, self.E),
            seed=torch.tensor(7) if self.dropout else None, causal=TOP_LEFT if self.causal else 0, left=self.window,
            right=0 if self.causal else -1, scale=self.E**-0.5, dropout_p=self.dropout,
        )  # fmt: skip
        return AttentionInputs(AttentionCase("B1H1L1S1E1"), problem, normal(self.B, self.H, self.L, self.E), None)

    def operations(self) -> int:
        """Of the two products of the forward pass, masked ones left out."""
        rows = torch.arange(self.L)
        S = self.S or self.L
        low = (rows - self.window).clamp(min=0) if self.window >= 0 else torch.zeros_like(rows)
        high = (rows + 1).clamp(max=S) if self.causal else torch.full_like(rows, S)
        return 4 * self.B * self.H * self.E * int((high - low).sum())


ROWS: dict[str, tuple[bool, tuple[Case, ...]]] = {
    "full, L >= 2048": (True, (Case(1, 8, 2048, 64), Case(1, 4, 2048, 128), Case(1, 2, 4096, 64))),
    "causal, L <= 512": (True, tuple(Case(2, 8, L, 64, causal=True) for L in (128, 256, 512))),
    "L <= 128 or E <= 32": (
        True, (Case(4, 8, 128, 64), Case(4, 8, 64, 32), Case(8, 8, 32, 64), Case(1, 8, 1024, 32), Case(2, 8, 256, 16)),
    ),
    "dropout 0.1": (True, tuple(Case(8192 // L // 2 or 1, 4, L, 64, dropout=0.1) for L in (128, 512, 2048))),
    "window 256": (True, (Case(1, 4, 4096, 64, causal=True, window=255),
                          Case(1, 1, 16384, 64, causal=True, window=255))),
    "bfloat16": (True, tuple(Case(1, 8, L, E, dtype="bfloat16") for L, E in ((512, 32), (1024, 64), (1024, 128)))),
    "decode": (False, (Case(1, 8, 1, 64, S=512, K=1), Case(1, 8, 1, 64, S=4096, K=1),
                       Case(4, 32, 1, 128, S=512, K=4), Case(4, 32, 1, 128, S=4096, K=4))),
}  # fmt: skip


def ours(p: Problem) -> tuple[Tensor, Tensor]:
    mask = fusedseq.Mask("top-left" if p.causal else None, (p.left, None)) if p.causal or p.left >= 0 else None
    return fusedseq.attention(
        p.q, p.k, p.v, mask=mask, scale=p.scale, dropout_p=p.dropout_p, seed=p.seed, return_lse=True
    )  # fmt: skip


def _table(p: Problem) -> Tensor | None:
    return visible(p)[0, 0] if p.left >= 0 else None


def torch_sdpa(p: Problem) -> Tensor:
    table = _table(p)
    return F.scaled_dot_product_attention(
        p.q, p.k, p.v, table, p.dropout_p, table is None and p.causal != 0, scale=p.scale,
        enable_gqa=p.q.shape[1] != p.k.shape[1],
    )  # fmt: skip


def eager(p: Problem) -> Tensor:
    G = p.q.shape[1] // p.k.shape[1]
    k, v = (t if G == 1 else t.repeat_interleave(G, 1) for t in (p.k, p.v))
    s = p.q @ k.transpose(-2, -1) * p.scale
    if p.causal or p.left >= 0:
        s = s.masked_fill(~visible(p), float("-inf"))
    return F.dropout(s.softmax(-1), p.dropout_p) @ v


def flex(case: Case) -> Callable[[Problem], Tensor]:
    """torch.compile of FlexAttention, forward only on a CPU; takes half a minute to build."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    left = case.window if case.window >= 0 else case.L + case.S

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j <= left)

    block = create_block_mask(seen, None, None, case.L, case.S or case.L, "cpu") if case.causal else None
    return lambda p: compiled(p.q, p.k, p.v, block_mask=block, scale=p.scale, enable_gqa=case.K not in (0, case.H))


def wrong(case: Case, attention: Attention, backward: bool) -> str | None:
    """What is beyond the tolerance of the tests, on a case cut to what the truth can be computed for."""
    small = replace(
        case, B=1, H=min(case.H, 8), K=1 if case.K else 0, L=min(case.L, CHECKED), S=min(case.S, 4 * CHECKED)
    )
    base = compare_with(small.inputs())
    errors = judge_attention(evaluate_attention(attention, base.inputs), base)
    return "; ".join(str(e) for e in errors if not e.ok and (backward or not e.name.startswith("d"))) or None


def _runner(attention: Callable[[Problem], Any], inputs: AttentionInputs, backward: bool) -> Callable[[], object]:
    p = inputs.problem
    if not backward:

        def infer() -> object:
            with torch.no_grad():
                return attention(p)

        return infer
    leaves = [t.clone().requires_grad_() for t in (p.q, p.k, p.v)]
    q, k, v = leaves
    p = p._replace(q=q, k=k, v=v)

    def train() -> object:
        out = attention(p)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, inputs.dout)

    return train


def measure(case: Case, backward: bool, budget: float, with_flex: bool) -> dict[str, float]:
    """Seconds of ours and of each peer that takes the case."""
    inputs = case.inputs()
    functions: dict[str, Callable[[Problem], Any]] = {"fusedseq": ours, "torch": torch_sdpa}
    if case.B * case.H * case.L * (case.S or case.L) <= EAGER:
        functions["eager"] = eager
    if with_flex and not backward and not case.dropout:
        functions["flex"] = flex(case)
    reason = wrong(case, ours, backward)
    if reason is not None:
        raise RuntimeError(f"{case}: ours is wrong, so it is not timed: {reason}")
    runners = {name: _runner(function, inputs, backward) for name, function in functions.items()}
    return {name: timing.median for name, timing in interleave(runners, budget).items()}


def report(rows: list[str], budget: float, with_flex: bool) -> Iterator[str]:
    yield f"{torch.get_num_threads()} threads, FMA peak {fma_peak(torch.get_num_threads()) / 1e9:.0f} GFLOP/s"
    for row, (trains, cases) in ROWS.items():
        if rows and not any(part in row for part in rows):
            continue
        for backward in (False, True)[: 2 if trains else 1]:
            ratios = []
            for case in cases:
                seconds = measure(case, backward, budget, with_flex)
                mine = seconds.pop("fusedseq")
                ratios.append(min(seconds.values()) / mine)
                rate = case.operations() * (3.5 if backward else 1) / mine / 1e9
                others = ", ".join(f"{name} {1e3 * s:.3f}" for name, s in seconds.items())
                yield f"  {case!s:44} {1e3 * mine:9.3f} ms {rate:6.0f} GFLOP/s  {ratios[-1]:5.2f}x  ({others})"
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            yield f"{row}, {'forward + backward' if backward else 'forward'}: {mean:.2f}x, least {min(ratios):.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[], help="parts of the names of rows")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each case")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention, compiled")
    options = parser.parse_args()
    for line in report(options.rows, options.budget, options.flex):
        print(line, flush=True)


if __name__ == "__main__":
    main()
