"""The gate before every time: a peer whose results are wrong gets no speed.

The rule is that of the tests (`fusedseq.testing`): the error against the truth in float64 is at most twice that of
torch's own implementation in the dtype of the case, plus a rounding floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .work import Outcome, Work


@dataclass(frozen=True)
class Verdict:
    error: float  # the largest relative norm error of an output or gradient
    wrong: str | None = None  # what is beyond the tolerance


class Gate:
    """Truth and yardstick of one case, made once for all its peers."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.truth = {name: t.cpu() for name, t in work.truth().items()}
        self.yardstick = {name: t.cpu() for name, t in work.yardstick().items()}

    def judge(self, outcome: Outcome) -> Verdict:
        try:
            errors = self.work.errors(outcome, self.truth, self.yardstick)
        except AssertionError as error:
            return Verdict(float("inf"), str(error))
        # torch is its own yardstick; this bounds it too.
        limit = 8 * torch.finfo(self.work.dtype).eps ** 0.5
        wrong = [str(e) for e in errors if not (e.ok and e.norm <= limit)]
        worst = max((e.norm for e in errors), key=lambda norm: (norm != norm, norm))
        return Verdict(worst, "; ".join(wrong) or None)
