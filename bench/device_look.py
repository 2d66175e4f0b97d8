"""A quick look at a GPU's times, for the minutes that one has it: fewer cases than `make device`, each with ours on
every tier or kernel that takes it, and what the profiler says of its kernels.

`python -P -m fusedseq.bench.device_look scans attention --out FILE` appends a line of JSON for each case. Results are
compared with torch's kernel in the same dtype (the relative norm of the difference), not with a truth: what is right
is for the tests to say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fusedseq import config, registry

from .attention_cases import AttentionCase
from .case import Case
from .device_cases import kernels, plans
from .peers import build
from .pointwise_cases import device as pointwise
from .rnn_cases import RecurrentCase
from .timing import interleave
from .work import Outcome, Refusal, Runner, make

BUDGET = 0.2  # seconds that a case is timed for
TIERS = ("block", "cluster", "grid", "step")
ATTENTION = ("cuda-mma", "cuda-hopper", "triton", "flash", "cudnn-attention")
# What results are compared with: the first of these that runs the case.
YARDSTICKS = ("torch", "flash", "efficient", "cudnn-attention")


def _scan(family: str, mode: str, B: int, T: int, H: int, **more: Any) -> RecurrentCase:
    return RecurrentCase(family, mode, B, T, H, H, dtype="bfloat16", device="cuda", **more)


def scans() -> Iterator[Case]:
    for mode in ("inference", "training"):
        yield from (_scan(family, mode, 16, 256, 512) for family in ("LSTM", "GRU", "RNN"))
        yield _scan("LSTM", mode, 16, 1024, 768)
    for family in ("LSTM", "GRU"):
        yield _scan(family, "training", 32, 256, 128)
        yield _scan(family, "training", 32, 200, 256, bidirectional=True)
        yield _scan(family, "training", 32, 200, 256, packed=True)
    for B, H in ((16, 1760), (64, 1760), (128, 2560)):
        yield _scan("RNN", "training", B, 50, H)
    for B, T, H in (
        (128, 25, 512), (16, 25, 1024), (128, 25, 1024), (32, 25, 2048), (128, 25, 2048), (64, 25, 4096), (8, 50, 1536),
        (512, 64, 512),
    ):  # fmt: skip
        yield _scan("LSTM", "training", B, T, H)
    yield from (_scan("GRU", "training", 32, 187, H) for H in (1536, 2048, 2816))
    yield replace(_scan("LSTM", "training", 16, 128, 512), dtype="float32")


def attention() -> Iterator[Case]:
    def one(mode: str, B: int, H: int, L: int, E: int, **more: Any) -> AttentionCase:
        return AttentionCase("attention", mode, B, H, L, E, dtype="bfloat16", device="cuda", **more)

    for E in (128, 64):
        yield from (one("training", 4, 2048 // E, 4096, E, causal=causal) for causal in (False, True))
    yield from (one("inference", 1, 2048 // E, 16384, E) for E in (128, 64))
    yield one("training", 2, 16, 8192, 128, causal=True, window=512)
    yield one("training", 2, 16, 8192, 128, window=512, global_keys=64)
    yield one("training", 4, 16, 4096, 128, lengths=True)
    yield one("training", 4, 16, 2048, 128, bias=True)
    yield one("training", 4, 16, 2048, 128, causal=True, dropout=0.1)
    yield from (one("training", 4, 2048 // E, 2048, E) for E in (96, 256))
    yield from (one("inference", 8, 32, 1, 128, S=S, K=4) for S in (4096, 65536))


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {"scans": scans, "attention": attention, "pointwise": pointwise}


def peers(case: Case) -> list[str]:
    if isinstance(case, AttentionCase):
        return [*ATTENTION, *(["efficient"] if case.bias else []), *(["flex"] if case.window or case.bias else [])]
    return ["fusedseq", "torch", *(["triton"] if not isinstance(case, RecurrentCase) or case.B >= 512 else [])]


def _under(runner: Runner, **settings: str) -> Runner:
    def within(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            before = config.settings
            config.settings = replace(before, **settings)  # type: ignore[arg-type]
            try:
                return call()
            finally:
                config.settings = before

        return run

    return replace(runner, call=within(runner.call), results=within(runner.results))


def look(case: Case, budget: float = BUDGET, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Seconds of every runner (median), its distance from the yardstick, and its kernels; why others did not run."""
    work, runners, refused = make(case), dict[str, Runner](), dict[str, str]()
    for name in peers(case) if names is None else names:
        built = build(name, work)
        if isinstance(built, Refusal):
            refused[name] = built.reason
        else:
            runners[name] = built
    if isinstance(case, RecurrentCase) and "fusedseq" in runners and case.device == "cuda":
        ours = runners["fusedseq"]
        runners |= {f"tier {tier}": _under(ours, cuda_tier=tier) for tier in TIERS}
        runners["warp"] = _under(ours, cuda_cluster="warp")
        runners["direct"] = _under(ours, cuda_products="direct")
        runners["tier step, direct"] = _under(ours, cuda_tier="step", cuda_products="direct")
    results: dict[str, Outcome] = {}
    chosen: dict[str, str] = {}
    for name in list(runners):
        try:
            with registry.record() as ran:
                results[name] = runners[name].results()
            chosen[name] = " ".join(sorted({choice.backend for choice in ran}))
        except (RuntimeError, registry.BackendError) as error:
            refused[name] = str(error)
            del runners[name]
    finish = torch.cuda.synchronize if case.device == "cuda" else None
    yardstick = next((results[name] for name in YARDSTICKS if name in results), None)
    times = interleave(
        {name: runner.call for name, runner in runners.items()}, budget, rounds=7, finish=finish,
        turns={name: runner.turn for name, runner in runners.items()},
    )  # fmt: skip
    return {
        "case": str(case), "fields": case.fields(), "operations": case.operations(), "bytes": case.compulsory_bytes(),
        "plans": plans(case) if case.device == "cuda" else {}, "refused": refused,
        "seconds": {name: timing.median for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "off": {name: _distance(found, yardstick) for name, found in results.items() if yardstick is not None},
        "backends": chosen,
        "kernels": {name: kernels(runners[name].call, 5) for name in runners} if case.device == "cuda" else {},
    }  # fmt: skip


def _distance(found: Outcome, yardstick: Outcome) -> float:
    """The largest relative norm of a difference."""
    both = [(t.double(), yardstick[name].double()) for name, t in found.items() if name in yardstick]
    return max((((a - b).norm() / b.norm()).item() for a, b in both if b.numel()), default=0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedseq.bench.device_look", description=__doc__)
    parser.add_argument("groups", nargs="+", choices=list(GROUPS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    options = parser.parse_args(arguments)
    for case in (case for group in options.groups for case in GROUPS[group]()):
        print(case, file=sys.stderr, flush=True)
        if not options.list:
            with options.out.open("a") as out:
                out.write(json.dumps(look(case)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
