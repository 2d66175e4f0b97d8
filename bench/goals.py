"""Sets with a goal: how far their cases are from the fastest peer, beside how far they are to be."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .cases import SETS
from .results import CaseResult


@dataclass(frozen=True)
class Half:
    """One mode of a row; ratios are in the goal's unit."""

    cases: int
    mean: float  # geometric
    least: float
    goal: float | None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.mean >= self.goal


@dataclass(frozen=True)
class GoalRow:
    name: str
    about: str
    unit: str
    halves: dict[str, Half]  # by mode

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rows(results: Iterable[CaseResult]) -> list[GoalRow]:
    """A row for each set with a goal that has a case with times of ours and of a rival."""
    found = list(results)
    made = []
    for name, one in SETS.items():
        if one.goal is None:
            continue
        halves = {}
        for mode in ("inference", "training"):
            ratios = [
                ratio / one.goal.unit(result.case)
                for result in found
                if name in result.sets and result.case.mode == mode and (ratio := result.ratio(result.best()))
            ]
            if ratios:
                halves[mode] = Half(len(ratios), statistics.geometric_mean(ratios), min(ratios), one.goal.of(mode))
        if halves:
            made.append(GoalRow(name, one.about, one.goal.unit_name, halves))
    return made


def slower(results: Iterable[CaseResult]) -> list[tuple[CaseResult, str, float]]:
    """The cases of sets with a goal in which a rival is faster: the result, the rival, our ratio; the worst first."""
    aimed = {name for name, one in SETS.items() if one.goal is not None}
    found = [
        (result, best, result.ratio(best) or 1.0)
        for result in results
        if aimed.intersection(result.sets) and (best := result.best())
    ]
    return sorted((one for one in found if one[2] < 1), key=lambda one: one[2])
