"""`python -m fusedseq.bench`: every case, torch.nn beside fusedseq, as one table."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys

import torch

import fusedseq
from fusedseq.bench.cases import FAMILIES, MODES, Work, cases, operations
from fusedseq.bench.timing import fma_peak, interleave


def machine() -> str:
    """What the figures hold for: versions, threads, and the instruction set that the core uses."""
    try:
        from fusedseq import _cpu

        isa = _cpu.isa()
    except ImportError:
        isa = "no compiled core"
    versions = f"fusedseq {fusedseq.__version__} ({isa}), torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {platform.machine()}, {torch.get_num_threads()} threads, float32"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedseq.bench", description=__doc__)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each case (default: 2)")
    parser.add_argument("--threads", type=int, help="threads for both (default: torch's choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    peak = fma_peak(torch.get_num_threads())
    print(machine())
    print(f"of peak: our products over {peak / 1e9:.0f} GFLOP/s, this machine's multiply-adds on registers alone")
    print(f"{'case':<38} {'ms torch.nn':>16} {'ms fusedseq':>16} {'ratio':>7} {'of peak':>8}", flush=True)
    ratios: dict[tuple[str, str], list[float]] = {}
    for case in cases(tuple(options.family), tuple(options.mode)):
        work = Work(case)
        work.check()
        result = interleave({peer: work.run(peer) for peer in work.modules}, options.budget)
        theirs, ours = result["torch"], result["fusedseq"]
        ratio = theirs.median / ours.median
        ratios.setdefault((case.family, case.mode), []).append(ratio)
        times = " ".join(f"{1e3 * t.median:>9.3f} ±{100 * t.spread:>4.0f}%" for t in (theirs, ours))
        reached = f"{100 * operations(case) / ours.median / peak:>7.0f}%" if peak else ""
        print(f"{case!s:<38} {times} {ratio:>6.2f}x {reached}", flush=True)

    print("\ngeometric mean of the ratios (above 1: fusedseq is faster), and the smallest")
    for (family, mode), values in ratios.items():
        print(f"{family:<5} {mode:<10} {statistics.geometric_mean(values):>5.2f}x  {min(values):>5.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
