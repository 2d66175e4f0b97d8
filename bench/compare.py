"""Two results side by side, case by case: by what did it change, and is that more than noise?"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .case import Case
from .results import OURS, CaseResult

# Below this no change is believed: two runs of the same code differ by as much.
LEAST_NOISE = 0.02


@dataclass(frozen=True)
class Change:
    case: Case
    a: float  # seconds of one call
    b: float
    ratio: float  # how many times faster B is
    noise: float  # a change smaller than this fraction says nothing

    @property
    def flag(self) -> str:
        if self.ratio > 1 + self.noise:
            return "faster"
        return "slower" if 1 / self.ratio > 1 + self.noise else ""


def change(a: CaseResult, b: CaseResult, in_turns: bool) -> Change | None:
    """None if either has no time.

    Results of two runs are each taken relative to torch.nn in its run, where both have it: what the machine did in
    between then cancels. Results measured in turns met the same machine as they are.
    """
    mine, other = a.peers.get(OURS), b.peers.get(OURS)
    if not (mine and other and mine.median and other.median):
        return None
    ratio, noise = mine.median / other.median, (mine.spread or 0.0) + (other.spread or 0.0)
    if not in_turns:
        of_a, of_b = a.ratio(a.torch()), b.ratio(b.torch())
        if of_a and of_b:
            ratio = of_b / of_a
            noise = (a.ratio_spread(a.torch()) or 0.0) + (b.ratio_spread(b.torch()) or 0.0)
    return Change(a.case, mine.median, other.median, ratio, max(noise, LEAST_NOISE))


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    apart: list[tuple[Case, str]]  # cases that could not be compared, and why

    def slower(self, percent: float) -> list[Change]:
        """What takes over `percent` longer in B, and by more than noise."""
        return [c for c in self.changes if c.flag == "slower" and 1 / c.ratio > 1 + percent / 100]

    def means(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Number of cases and geometric mean of the ratios by family and mode."""
        groups: dict[tuple[str, str], list[float]] = {}
        for c in self.changes:
            groups.setdefault((c.case.family, c.case.mode), []).append(c.ratio)
        return {key: (len(ratios), statistics.geometric_mean(ratios)) for key, ratios in groups.items()}


def compare(pairs: Iterable[tuple[CaseResult, CaseResult]], in_turns: bool) -> Comparison:
    changes, apart = [], []
    for a, b in pairs:
        found = change(a, b, in_turns)
        if found is not None:
            changes.append(found)
            continue
        for name, result in (("A", a), ("B", b)):
            peer = result.peers.get(OURS)
            if peer is None or not peer.median:
                apart.append((result.case, f"{name} has no time: {peer.reason if peer else 'fusedseq did not run'}"))
    return Comparison(changes, apart)


def match(
    a: Sequence[CaseResult], b: Sequence[CaseResult]
) -> tuple[list[tuple[CaseResult, CaseResult]], list[tuple[Case, str]]]:
    """The cases of both, and those of only one. A case is the same if it ran with as many threads."""

    def keyed(results: Sequence[CaseResult]) -> Mapping[tuple[str, int], CaseResult]:
        return {(str(result.case), result.threads): result for result in results}

    of_a, of_b = keyed(a), keyed(b)
    both = [(result, of_b[key]) for key, result in of_a.items() if key in of_b]
    alone = [(result.case, "only in A") for key, result in of_a.items() if key not in of_b]
    alone += [(result.case, "only in B") for key, result in of_b.items() if key not in of_a]
    return both, alone
