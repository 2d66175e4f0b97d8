"""Runs cases: builds the peers, checks them against the truth, then times them in turns."""

from __future__ import annotations

import datetime
import gc
import math
import subprocess
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusedseq import info, registry

from .case import Case
from .parity import Gate, Verdict
from .peers import PEERS, build, shown, takes
from .results import CaseResult, PeerResult, Run
from .timing import copy_bandwidth, fma_peak, interleave, read_bandwidth
from .work import Refusal, Runner, Work, make

HERE = Path(__file__).resolve().parent


def begin(settings: Mapping[str, Any]) -> Run:
    """An empty run that knows what its results will hold for."""
    about = info.collect()
    about["git"] = revision()
    about["settings"] = dict(settings)
    about["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Run(about, {})


def revision() -> dict[str, Any] | None:
    """The git revision of the checkout that holds the benchmarks; None if it is none."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installed package may lie in somebody else's repository.
        git("ls-files", "--error-unmatch", "cases.py")
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def ceilings(run: Run, threads: int) -> dict[str, float]:
    """What this machine reaches at best with so many threads; measured once for each number."""
    known = run.ceilings.get(str(threads))
    if known is None:
        known = {"fma": fma_peak(threads), "copy": copy_bandwidth(threads), "read": read_bandwidth(threads)}
        run.ceilings[str(threads)] = known
    return known


def run_cases(
    run: Run, cases: Mapping[Case, Sequence[str]], peers: Sequence[str], budget: float, told: Callable[[str], None]
) -> Iterator[CaseResult]:
    """The results, one by one, also added to the run. `told` hears which case and peer is being worked on."""
    before = torch.get_num_threads()
    for case, sets in cases.items():
        torch.set_num_threads(case.threads or before)
        try:
            known = ceilings(run, torch.get_num_threads())
            if case.device == "cpu" and peak_name(case) not in known:
                known[peak_name(case)] = fma_peak(torch.get_num_threads(), dtype=case.dtype)
            result = run_case(case, sets, peers, budget, known, told)
        finally:
            torch.set_num_threads(before)
        run.results.append(result)
        _raise_peak(run, result)
        yield result


def _raise_peak(run: Run, result: CaseResult) -> None:
    """The peak is the highest rate seen in the run: a shared machine may have been slow when it was first measured."""
    ceiling = run.ceilings[str(result.threads)]
    name = peak_name(result.case)
    if name not in ceiling:
        return
    ceiling[name] = max(ceiling[name], fma_peak(result.threads, dtype=result.case.dtype))
    for one in run.results:
        if one.threads == result.threads:
            one.peak = peak(one.case, ceiling)


def peak_name(case: Case) -> str:
    """The ceiling that holds for the products of a case, `fma` for float32."""
    return "fma" if case.dtype == "float32" else f"fma {case.dtype}"


def peak(case: Case, ceiling: Mapping[str, float]) -> float:
    """Operations per second on registers of the CPU. 0: not known."""
    return 0.0 if case.device != "cpu" else ceiling.get(peak_name(case), 0.0)


def run_case(
    case: Case,
    sets: Sequence[str],
    peers: Sequence[str],
    budget: float,
    ceiling: Mapping[str, float],
    told: Callable[[str], None] = lambda text: None,
) -> CaseResult:
    results: dict[str, PeerResult] = {}
    runners: dict[str, Runner] = {}
    verdicts: dict[str, Verdict] = {}
    backends: set[str] = set()
    work = make(case)
    gates = Gates(work)
    peers = [name for name in peers if takes(name, case)]
    for name in peers:
        told(f"{case}: {name}")
        label = shown(name, case)
        with registry.record() as ran:
            try:
                built = build(name, work)
                if isinstance(built, Refusal):
                    if not PEERS[name].companion:
                        results[label] = PeerResult("refused", reason=built.reason)
                    continue
                runners[label] = built
                verdicts[label] = gates.judge(built)
            except Exception as error:  # one peer that breaks down must not take the other cases with it
                verdicts[label] = Verdict(math.nan, f"raised {type(error).__name__}: {error}")
        if name == "fusedseq":
            backends = {choice.backend for choice in ran}
        if verdicts[label].wrong is not None:
            runners.pop(label, None)
            results[label] = PeerResult("wrong", error=verdicts[label].error, reason=verdicts[label].wrong)
    told(f"{case}: timing")
    gates.forget()
    if runners:
        timings = interleave(
            {label: runner.call for label, runner in runners.items()},
            budget,
            pools={label: runner.pool for label, runner in runners.items()},
            finish=torch.cuda.synchronize if case.device == "cuda" else None,
            turns={label: runner.turn for label, runner in runners.items()},
        )
        for label, timing in timings.items():
            results[label] = PeerResult.of(timing, verdicts[label].error)
    labels = [label for name in peers if (label := shown(name, case)) in results]
    return CaseResult(
        case=case,
        sets=list(sets),
        threads=torch.get_num_threads(),
        peers={label: results[label] for label in labels},
        backend=" ".join(sorted(backends)),
        operations=case.operations(),
        bytes=case.compulsory_bytes(),
        peak=peak(case, ceiling),
        rivals=[shown(name, case) for name in peers if PEERS[name].rival],
    )


class Gates:
    """The gate of a case, and those of what else some of its peers are judged by, made when first needed."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._gates: dict[Hashable, Gate] = {}

    def judge(self, runner: Runner) -> Verdict:
        work = runner.judged_by or self._work
        gate = self._gates.get(work.key())
        if gate is None:
            gate = self._gates[work.key()] = Gate(work)
        return gate.judge(runner.results())

    def forget(self) -> None:
        """Give back the memory of truths and yardsticks before the clock runs."""
        self._gates.clear()
        gc.collect()
