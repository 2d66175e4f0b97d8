"""The benchmark of `make device`: ours beside torch's own kernels on the GPU, the most telling cases first.

`python -P -m fusedseq.bench.device_cases --part rnn --seconds 180 --out FILE` writes FILE after every case, so that
whoever stops it has what was measured until then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .attention_cases import SETS as ATTENTION_SETS
from .attention_cases import AttentionCase
from .case import Case
from .deepbench import TRAINING, sizes
from .pointwise_cases import PointwiseCase
from .pointwise_cases import device as pointwise
from .rnn_cases import RecurrentCase

PARTS = ("rnn", "attention")
# Seconds that a case is timed for; building and checking it comes on top.
BUDGET = 0.4


def rnn() -> Iterator[Case]:
    """LSTM 768/16/1024, both directions, packed rows, then DeepBench's training set without its longest sequences."""
    for dtype in ("bfloat16", "float16"):
        for mode in ("inference", "training"):
            yield RecurrentCase("LSTM", mode, 16, 1024, 768, 768, dtype=dtype, device="cuda")
    for family, B, H in (("LSTM", 16, 512), ("GRU", 16, 512), ("RNN", 16, 512), ("LSTM", 32, 128), ("GRU", 32, 128)):
        for mode in ("inference", "training"):
            yield RecurrentCase(family, mode, B, 256, H, H, dtype="bfloat16", device="cuda")
    for family in ("LSTM", "GRU"):
        for more in ({"bidirectional": True}, {"packed": True}):
            yield RecurrentCase(family, "training", 32, 200, 256, 256, dtype="bfloat16", device="cuda", **more)
    # More rows than multiprocessors have room for one by one: on Triton, tiles of 64 rows.
    yield RecurrentCase("LSTM", "training", 512, 256, 512, 512, dtype="bfloat16", device="cuda")
    yield from pointwise()
    for family, H, B, T in sizes(TRAINING):
        if T <= 200:
            yield RecurrentCase(family, "training", B, T, H, H, dtype="bfloat16", device="cuda")


def attention() -> Iterator[Case]:
    """One of each kind first, then the lengths in between."""
    made = [case.but(device="cuda") for name in ("attention-gpu", "attention-gpu-more") for case in _made(name)]
    attention = [case for case in made if isinstance(case, AttentionCase)]
    first = [case for case in attention if case.L not in (512, 2048) or case.bias or case.dropout]
    yield from sorted(first, key=lambda case: case.mode)
    yield from (case for case in attention if case not in first)


def _made(name: str) -> Iterator[Case]:
    one = ATTENTION_SETS[name]
    return (case.but(dtype=one.dtype or case.dtype) for case in one.make())


def peers(case: Case) -> list[str]:
    """Who runs a case. What compiles long stands beside few: FlexAttention beside what it is made for, Triton beside
    one case of each kind of scan, and all pointwise ones."""
    if isinstance(case, AttentionCase):
        flex = case.window or case.lengths or case.bias or (case.L == 16384 and case.mode == "inference")
        ours = ["fusedseq", "cuda-mma", "cuda-hopper", "triton"]
        return [*ours, "flash", "cudnn-attention", "efficient", *(["flex"] if flex else [])]
    each = isinstance(case, PointwiseCase) or (
        isinstance(case, RecurrentCase) and case.mode == "training" and case.T == 256
    )
    return ["fusedseq", "torch", *(["triton"] if each else [])]


def cases(parts: Sequence[str]) -> list[Case]:
    found = [*(rnn() if "rnn" in parts else ()), *(attention() if "attention" in parts else ())]
    return list(dict.fromkeys(found))


def kernels(call: Any, most: int = 3) -> list[str]:
    """The kernels of one call that take the longest together, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return [f"{event.key} x{event.count}, {event.device_time_total:.1f} us" for event in events[:most]]


def copying(case: Case) -> float | None:
    """Seconds that a copy takes which moves as many bytes as a pointwise case must; None for other cases."""
    if not isinstance(case, PointwiseCase):
        return None
    from .timing import interleave

    source = torch.empty(case.compulsory_bytes() // 2, dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    finish = torch.cuda.synchronize if case.device == "cuda" else None
    return interleave({"copy": lambda: target.copy_(source)}, BUDGET / 2, finish=finish)["copy"].median


def plans(case: Case) -> dict[str, Any]:
    """How our scans of a recurrent case run: tier, CTAs of a group, rows of a tile, for both passes."""
    if not isinstance(case, RecurrentCase):
        return {}
    from fusedseq.backends import cuda, cuda_products, cuda_scan

    if cuda.missing() is not None:
        return {}
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[case.family]
    x = torch.empty(0, dtype=getattr(torch, case.dtype), device="cuda")
    scan = (case.T, case.B, case.H, case.R, case.D)
    found = {}
    for name, backward in (("forward", False), ("backward", True)):
        plan = cuda_scan.plan(cuda.core(), x, cell, scan, case.proj > 0, backward, cuda_products.tf32(x.dtype))
        found[name] = {"tier": cuda.core().tiers[plan.tier], "ranks": plan.ranks, "rows": plan.rows}
    return found


def measure(parts: Sequence[str], seconds: float, out: Path) -> int:
    """Run the cases of `parts` until the time is over; how many did not get their turn."""
    from dataclasses import asdict

    from .peers import build
    from .run import run_case
    from .work import Refusal, make

    wanted, ended = cases(parts), time.monotonic() + seconds
    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
        "cases": [], "not_reached": [str(case) for case in wanted],
    }  # fmt: skip
    for case in wanted:
        if time.monotonic() > ended:
            break
        print(case, file=sys.stderr, flush=True)
        result = run_case(case, [], peers(case), BUDGET, {})
        named = {}
        for peer in peers(case)[:5] if isinstance(case, AttentionCase) else peers(case):
            runner = build(peer, make(case))
            if not isinstance(runner, Refusal):
                with runner.turn():
                    named[peer] = kernels(runner.call)
        record["cases"].append({
            "case": str(case), "fields": case.fields(), "backend": result.backend,
            "operations": result.operations, "bytes": result.bytes, "plans": plans(case),
            "peers": {name: asdict(peer) for name, peer in result.peers.items()}, "kernels": named,
            "copy": copying(case),
        })  # fmt: skip
        record["not_reached"].remove(str(case))
        out.write_text(json.dumps(record, indent=1))
    out.write_text(json.dumps(record, indent=1))
    return len(record["not_reached"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedseq.bench.device_cases", description=__doc__)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    options = parser.parse_args(arguments)
    parts = PARTS if options.part == "all" else (options.part,)
    if options.list:
        print("\n".join(map(str, cases(parts))))
        return 0
    if options.out is None:
        parser.error("--out is needed")
    measure(parts, options.seconds, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
