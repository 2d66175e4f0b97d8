"""The result of a run as data: JSON that every other command reads, CSV, and the summary."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .case import Case
from .timing import Timing, middle

SCHEMA = 1
OURS = "fusedseq"
PADDED = "padded"
# torch.nn has this name on a GPU.
TORCH = ("torch", "cudnn")


class ResultError(ValueError):
    """A file that is not a result of this program."""


@dataclass
class PeerResult:
    """A time, or the reason why there is none. `status` is ok, refused or wrong."""

    status: str
    median: float | None = None  # seconds of one call
    spread: float | None = None  # half the distance between the quartiles, as a fraction of the median
    samples: list[float] = field(default_factory=list)
    error: float | None = None  # largest relative error against float64
    reason: str | None = None

    @classmethod
    def of(cls, timing: Timing, error: float) -> PeerResult:
        return cls("ok", timing.median, timing.spread, timing.samples, error)


@dataclass
class CaseResult:
    case: Case
    sets: list[str]
    threads: int
    peers: dict[str, PeerResult]
    backend: str  # the backends of ours that ran
    operations: int
    bytes: int
    peak: float = 0.0  # operations per second that this machine reaches on registers alone; 0: not measured
    rivals: list[str] = field(default_factory=list)  # peers that the best one is chosen from

    def median(self, peer: str) -> float | None:
        result = self.peers.get(peer)
        return result.median if result else None

    def torch(self) -> str | None:
        return next((name for name in TORCH if self.median(name)), None)

    def best(self) -> str | None:
        """The fastest rival."""
        timed = {name: seconds for name in self.rivals if (seconds := self.median(name))}
        return min(timed, key=timed.__getitem__) if timed else None

    def ratio(self, peer: str | None) -> float | None:
        """How many times faster than the peer ours is."""
        ours, theirs = self.median(OURS), self.median(peer or "")
        return theirs / ours if ours and theirs else None

    def ratio_spread(self, peer: str | None) -> float | None:
        """Half the distance between the quartiles of the ratios of the single rounds, as a fraction."""
        if not (self.ratio(peer) and peer):
            return None
        pairs = zip(self.peers[peer].samples, self.peers[OURS].samples, strict=False)
        ratios = [theirs / ours for theirs, ours in pairs]
        return middle(ratios)[1] if ratios else None

    def of_peak(self) -> float | None:
        ours = self.median(OURS)
        return self.operations / ours / self.peak if ours and self.peak else None

    def packed_over_padded(self) -> float | None:
        """Time of the packed run over that of the padded one; below 1 packing saves time."""
        ours, padded = self.median(OURS), self.median(PADDED)
        return ours / padded if ours and padded else None

    @property
    def wrong(self) -> dict[str, str]:
        return {name: peer.reason or "" for name, peer in self.peers.items() if peer.status == "wrong"}

    def as_json(self) -> dict[str, Any]:
        best, torch = self.best(), self.torch()
        return {
            "name": str(self.case),
            "case": self.case.fields(),
            "sets": self.sets,
            "threads": self.threads,
            "backend": self.backend,
            "operations": self.operations,
            "bytes": self.bytes,
            "peak": self.peak,
            "rivals": self.rivals,
            "peers": {name: asdict(peer) for name, peer in self.peers.items()},
            "best_peer": best,
            "ratio_best": self.ratio(best),
            "ratio_torch": self.ratio(torch),
            "ratio_torch_spread": self.ratio_spread(torch),
            "of_peak": self.of_peak(),
            "packed_over_padded": self.packed_over_padded(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CaseResult:
        peers = {name: PeerResult(**peer) for name, peer in value["peers"].items()}
        same = ("sets", "threads", "backend", "operations", "bytes", "peak", "rivals")
        return cls(case=Case.of(value["case"]), peers=peers, **{name: value[name] for name in same})


@dataclass
class Run:
    """All results of one command, and what they hold for."""

    about: dict[str, Any]  # machine, versions, threads, environment, git, settings, time
    ceilings: dict[str, dict[str, float]]  # by number of threads: fma (operations/s), copy and read (bytes/s)
    results: list[CaseResult] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **self.about,
            "ceilings": self.ceilings,
            "results": [result.as_json() for result in self.results],
            "summary": [row.as_json() for row in summarize(self.results)],
        }

    def title(self) -> str:
        """The machine in one line."""
        isa = self.about["isa"]["in_use"] or "no compiled core"
        cores = sorted({result.threads for result in self.results}) or [self.about["threads"]["torch"]]
        devices = {result.case.device for result in self.results}
        where = ", ".join(self.about["machine"]["gpus"][:1]) if devices == {"cuda"} else self.about["machine"]["cpu"]
        threads = " or ".join(map(str, cores))
        return f"{where}, {isa}, {threads} thread{'' if cores == [1] else 's'}, torch {self.about['versions']['torch']}"


def save(run: Run, path: Path) -> None:
    path.write_text(json.dumps(run.as_json(), indent=1) + "\n")


def load(path: Path) -> Run:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ResultError(f"{path}: expected the JSON of `fusedseq bench --json`, got something else") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema", "none") if isinstance(value, dict) else "none"
        raise ResultError(f"{path}: expected a result of schema {SCHEMA}, got {found}")
    drop = ("schema", "ceilings", "results", "summary")
    about = {name: part for name, part in value.items() if name not in drop}
    return Run(about, value["ceilings"], [CaseResult.from_json(result) for result in value["results"]])


COLUMNS = (
    "case", "sets", "family", "mode", "dtype", "device", "threads", "backend", "peer", "status", "median_s", "spread",
    "error", "ratio_to_fusedseq", "ratio_torch", "best_peer", "ratio_best", "of_peak", "operations", "bytes", "reason",
)  # fmt: skip


def merge(runs: list[Run]) -> Run:
    """The cases of several results, such as of parts of a long run; of a case in more than one, the last."""
    merged: dict[tuple[str, int], CaseResult] = {}
    for run in runs:
        merged |= {(str(result.case), result.threads): result for result in run.results}
    return Run(runs[-1].about, runs[-1].ceilings, list(merged.values()))


def save_csv(run: Run, path: Path) -> None:
    """One line for each peer of each case; the machine is in the JSON."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for result in run.results:
            case = result.case
            for name, peer in result.peers.items():
                writer.writerow([
                    str(case), " ".join(result.sets), case.family, case.mode, case.dtype, case.device, result.threads,
                    result.backend, name, peer.status, peer.median, peer.spread, peer.error, result.ratio(name),
                    result.ratio(result.torch()), result.best(), result.ratio(result.best()), result.of_peak(),
                    result.operations, result.bytes, peer.reason,
                ])  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Ratios of the cases of one kind: geometric mean and minimum, to torch.nn and to the best peer."""

    family: str
    mode: str
    dtype: str
    device: str
    cases: int
    torch_mean: float
    torch_least: float
    best_mean: float
    best_least: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(results: Iterable[CaseResult]) -> list[Summary]:
    """Cases without a right and timed torch.nn have no ratio and are left out."""
    groups: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for result in results:
        torch, best = result.ratio(result.torch()), result.ratio(result.best())
        if torch and best:
            case = result.case
            groups.setdefault((case.family, case.mode, case.dtype, case.device), []).append((torch, best))
    rows = []
    for kind, ratios in groups.items():
        torch_ratios, best_ratios = zip(*ratios, strict=True)
        mean = statistics.geometric_mean
        values = mean(torch_ratios), min(torch_ratios), mean(best_ratios), min(best_ratios)
        rows.append(Summary(*kind, len(ratios), *values))
    return rows
