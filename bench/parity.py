"""The gate before every time: a peer whose results are wrong gets no speed.

The rule is that of the tests (`fusedseq.testing.compare`): the error against torch.nn in float64 is at most twice that
of torch.nn in the dtype of the case, plus a rounding floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedseq.testing.compare import judge

from .work import Outcome, Work


@dataclass(frozen=True)
class Verdict:
    error: float  # the largest relative norm error of an output or gradient
    wrong: str | None = None  # what is beyond the tolerance


class Gate:
    """Truth and yardstick of one case, made once for all its peers."""

    def __init__(self, work: Work, yardstick: Outcome) -> None:
        self.work = work
        self.truth = {name: t.cpu() for name, t in work.truth().items()}
        self.yardstick = {name: t.cpu() for name, t in yardstick.items()}

    def judge(self, outcome: Outcome) -> Verdict:
        terms = sum(self.work.case.lengths())
        try:
            errors = judge(outcome, self.truth, self.yardstick, self.work.dtype, terms)
        except AssertionError as error:  # other tensors, shapes or dtypes
            return Verdict(float("inf"), str(error))
        # torch.nn is its own yardstick; this bounds it too.
        limit = 8 * torch.finfo(self.work.dtype).eps ** 0.5
        wrong = [str(e) for e in errors if not (e.ok and e.norm <= limit)]
        worst = max((e.norm for e in errors), key=lambda norm: (norm != norm, norm))
        return Verdict(worst, "; ".join(wrong) or None)
