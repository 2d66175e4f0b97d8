"""What the barriers of the CUDA backend's scans cost by themselves, for `make device`: clocks of a round, beside those
that the choice of a tier assumes (`exchange_clocks` in csrc/cuda/barrier_costs.h).

`python -P -m fusedseq.bench.barriers --out FILE` measures; with --list it names what it would measure.

Each loop runs twice: nothing but barriers, and with a word that is handed from one thread to the next in every round,
which shows that the barrier synchronises and what a value on its way costs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROUNDS = 2000
REPEATS = 3  # launches, of which the fastest counts


@dataclass(frozen=True)
class BarrierCase:
    kind: str  # as `barriers` of the compiled module names it
    ctas: int  # 0: as many as the device has SMs
    threads: int
    units: int = 0  # of a rank in an exchange: 16 rows of as many 2-byte values are what it sends
    tier: str = ""  # the tier whose assumed figure it is about
    per_step: int = 1  # how many of them a step of that tier has

    def __str__(self) -> str:
        size = f" {self.units} units" if self.units else ""
        return f"barrier {self.kind} {self.ctas or 'all'} CTAs x {self.threads}{size}"


def cases() -> list[BarrierCase]:
    """Blocks of the sizes that scans have; clusters and exchanges of theirs; a pair of CTAs; the whole device."""
    found = [BarrierCase("block", 1, threads, tier="block", per_step=2) for threads in (128, 256, 384, 512, 1024)]
    found += [BarrierCase("cluster", ctas, 256) for ctas in (2, 8, 16)]
    found += [BarrierCase("cluster_exchange", ctas, 256, 32, tier="cluster") for ctas in (2, 8, 16)]
    found += [BarrierCase(f"warp_exchange_{rows}", ctas, 256) for rows in (4, 8) for ctas in (4, 8, 16)]
    found += [BarrierCase("flag", 2, 32)]
    found += [BarrierCase("grid_exchange", ctas, 256, 16, tier="grid") for ctas in (2, 16, 48)]
    return [*found, BarrierCase("grid", 0, 256)]


def measure(core: Any, case: BarrierCase, rounds: int = ROUNDS, device: str = "cuda") -> dict[str, Any]:
    """Clocks and nanoseconds of a round, those of the slowest CTA; or the reason why there are none.

    Raises RuntimeError if the word has not been handed on in every round: then the barrier does not synchronise.
    """
    ctas = case.ctas or core.device()[1]
    row: dict[str, Any] = {"case": str(case), **asdict(case), "ctas": ctas, "rounds": rounds}
    row["assumed"] = core.assumed_clocks(core.tiers.index(case.tier), ctas) if case.tier else None
    for handed in (False, True):
        best: tuple[float, float] | None = None
        for _ in range(REPEATS):
            try:
                clocks, ns, word = _launch(core, case, ctas, rounds, handed, device)
            except RuntimeError as error:
                return row | {"reason": str(error)}
            if word != (rounds if handed else 0):
                raise RuntimeError(f"{case}: {rounds} rounds handed the word on {word} times")
            best = min(best or (clocks, ns), (clocks, ns))
        assert best is not None
        row |= {"clocks_handed": best[0], "ns_handed": best[1]} if handed else {"clocks": best[0], "ns": best[1]}
    return row


def _launch(
    core: Any, case: BarrierCase, ctas: int, rounds: int, handed: bool, device: str
) -> tuple[float, float, int]:
    kind = core.barriers.index(case.kind)
    clocks, ns = (torch.zeros(ctas, dtype=torch.int64, device=device) for _ in range(2))
    word = torch.zeros(ctas, dtype=torch.int32, device=device)
    room = torch.zeros(core.barrier_workspace(kind, ctas, case.units) + 256, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else None
    core.barrier_rounds(
        kind, ctas, case.threads, rounds, case.units, handed,
        {
            "clocks": clocks.data_ptr(), "ns": ns.data_ptr(), "word": word.data_ptr(),
            "workspace": -(-room.data_ptr() // 256) * 256, "stream": stream,
        },
    )  # fmt: skip
    return clocks.max().item() / rounds, ns.max().item() / rounds, int(word.max())


def run(core: Any, wanted: Sequence[BarrierCase], out: Path, rounds: int = ROUNDS, device: str = "cuda") -> None:
    """Measure, writing `out` after every case."""
    rows: list[dict[str, Any]] = []
    for case in wanted:
        print(case, file=sys.stderr, flush=True)
        rows.append(measure(core, case, rounds, device))
        out.write_text(json.dumps(rows, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedseq.bench.barriers", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true", help="print what would be measured and run nothing")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(map(str, cases())))
        return 0
    if options.out is None:
        parser.error("--out is needed")
    from fusedseq.backends import cuda

    if (why := cuda.missing()) is not None:
        print(f"the CUDA kernels are not usable: {why}", file=sys.stderr)
        return 1
    run(cuda.core(), cases(), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
