"""A linear layer made concrete: its tensors, the truth, and how a function is driven through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedseq.testing.compare import Error, judge

from .linear_cases import LinearCase
from .work import Outcome, Runner, Work


class LinearWork(Work):
    def __init__(self, case: LinearCase, seed: int = 0) -> None:
        super().__init__(case)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(case.device, self.dtype)

        self.x, self.weight, self.bias = draw(case.M, case.K), draw(case.N, case.K), draw(case.N)
        self.dy = draw(case.M, case.N)

    def truth(self) -> Outcome:
        exact = LinearWork.__new__(LinearWork)
        exact.case, exact.dtype = self.case, torch.float64
        exact.x, exact.weight, exact.bias, exact.dy = (t.double() for t in (self.x, self.weight, self.bias, self.dy))
        return drive(exact, F.linear).results()

    def yardstick(self) -> Outcome:
        return drive(self, F.linear).results()

    def errors(self, outcome: Outcome, truth: Outcome, yardstick: Outcome) -> list[Error]:
        return judge(outcome, truth, yardstick, self.dtype, terms=max(self.case.K, self.case.M))


def drive(work: LinearWork, function: Callable[..., Any]) -> Runner:
    if work.case.mode == "inference":

        def infer() -> Outcome:
            with torch.inference_mode():
                return {"y": function(work.x, work.weight, work.bias)}

        return Runner(infer, infer)
    wanted = [t.clone().requires_grad_() for t in (work.x, work.weight, work.bias)]

    def train() -> Outcome:
        y = function(*wanted)
        return {"y": y, **dict(zip(("dx", "dweight", "dbias"), torch.autograd.grad(y, wanted, work.dy), strict=True))}

    return Runner(train, lambda: {name: t.detach() for name, t in train().items()})


def make(case: LinearCase, seed: int = 0) -> LinearWork:
    return LinearWork(case, seed)
