"""What the runner needs of a case made concrete: its peers' runners, the truth, and how a result is judged."""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedseq.testing.compare import Error

from .case import Case
from .timing import Turn

Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class Runner:
    """A peer ready to run: `call` is what is timed, `results` what is compared. They do the same work.

    Where the numbers that a call gives cannot be known (a padded run beside a packed one, another's random numbers),
    `results` are those of another case, whose tensors are `judged_by`.
    """

    call: Callable[[], object]
    results: Callable[[], Outcome]
    pool: str = "torch"  # the thread pool that works, so that the timer can let another one go to sleep
    # What a user's loop enters once and not for every call, such as torch.inference_mode around a stream of steps.
    turn: Turn = contextlib.nullcontext
    judged_by: Work | None = None  # None: the work that the runner was made from


@dataclass(frozen=True)
class Refusal:
    """Why a peer does not take a case."""

    reason: str


class Work(ABC):
    """The inputs of a case, the same for every peer."""

    # Peers that choose their fastest form by a trial take their first one instead: memory is measured at its first use.
    untried = False

    def __init__(self, case: Case) -> None:
        self.case: Any = case  # each kind of work knows its kind of case
        self.dtype: torch.dtype = getattr(torch, case.dtype)

    def key(self) -> Hashable:
        """Works with the same key have the same truth and yardstick."""
        return self.case

    @abstractmethod
    def truth(self) -> Outcome:
        """The results in float64, on the inputs and weights as rounded to the dtype of the case."""

    @abstractmethod
    def yardstick(self) -> Outcome:
        """The results of torch's own implementation in the dtype of the case."""

    @abstractmethod
    def errors(self, outcome: Outcome, truth: Outcome, yardstick: Outcome) -> list[Error]:
        """Each tensor's error beside what is allowed. AssertionError: there are other tensors, shapes or dtypes."""


def make(case: Case, seed: int = 0) -> Work:
    # Not imported above: an older fusedseq that is timed by these benchmarks may not have what another kind needs.
    made: Work = importlib.import_module(f".{case.kind}_work", __package__).make(case, seed)
    return made
