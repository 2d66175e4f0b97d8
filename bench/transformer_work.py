"""A module of the Transformer made concrete: its input and weights, and how a module is driven through them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fusedseq.testing.compare import Error, judge

from .transformer_cases import TransformerCase
from .work import Outcome, Runner, Work

# Some eight times the spread of the sums that ReLU is given.
FIRM = 5.0


def build(library: ModuleType, case: TransformerCase) -> nn.Module:
    """The module of torch.nn or fusedseq."""
    made: nn.Module
    if case.layer:
        made = library.TransformerEncoderLayer(case.d, case.heads, 4 * case.d, case.dropout, batch_first=True)
    else:
        made = library.MultiheadAttention(case.d, case.heads, case.dropout, batch_first=True)
    return made


def without_dropout(module: nn.Module) -> nn.Module:
    """A copy that leaves out no element: what can be compared when the random numbers cannot."""
    still = copy.deepcopy(module)
    for part in still.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return still


class TransformerWork(Work):
    """With the weights, as a module of torch.nn."""

    def __init__(self, case: TransformerCase, seed: int = 0) -> None:
        super().__init__(case)
        generator = torch.Generator().manual_seed(seed)
        shape = (case.B, case.L, case.d)
        self.x, self.dy = (torch.randn(shape, generator=generator).to(case.device, self.dtype) for _ in range(2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = build(nn, case)
            # Biases and scales as initialised are all 0 or 1, which hides errors in them.
            with torch.no_grad():
                for parameter in self.module.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
                if case.layer:
                    # Each unit is firmly on or off: where a sum lies within rounding of ReLU's kink, a gradient that
                    # is right by its own sum is far from that of the truth.
                    first: Any = self.module.linear1
                    first.bias.copy_(FIRM * (2.0 * (torch.arange(4 * case.d) % 2) - 1))
        self.module.to(case.device, self.dtype)

    def truth(self) -> Outcome:
        exact = TransformerWork.__new__(TransformerWork)
        exact.case, exact.dtype = self.case, torch.float64
        exact.x, exact.dy = self.x.double(), self.dy.double()
        # In training mode, where torch.nn computes in one way only.
        return drive(exact, without_dropout(self.module).double().train()).results()

    def yardstick(self) -> Outcome:
        return drive(self, self.same_weights(nn)).results()

    def errors(self, outcome: Outcome, truth: Outcome, yardstick: Outcome) -> list[Error]:
        return judge(outcome, truth, yardstick, self.dtype, terms=self.case.B * self.case.L)

    def same_weights(self, library: ModuleType) -> nn.Module:
        """The module of a library with a copy of the weights."""
        module = build(library, self.case).to(self.case.device, self.dtype)
        module.load_state_dict(self.module.state_dict())
        return module.train(self.case.mode == "training")


def drive(
    work: TransformerWork, module: nn.Module, wrap: Callable[[nn.Module], Callable[..., Any]] = lambda module: module
) -> Runner:
    """Run a module through the mode of the case, as `wrap` makes it callable.

    With dropout its results are those of a copy without.
    """
    if not work.case.dropout:
        call = _call(work, module, wrap(module))
        return Runner(call, _results(call))
    still = without_dropout(module)
    judged_by = TransformerWork(work.case.but(dropout=0.0))
    return Runner(
        _call(work, module, wrap(module)), _results(_call(judged_by, still, wrap(still))), judged_by=judged_by
    )


def _results(call: Callable[[], Outcome]) -> Callable[[], Outcome]:
    return lambda: {name: t.detach() for name, t in call().items()}


def _call(work: TransformerWork, module: nn.Module, function: Callable[..., Any]) -> Callable[[], Outcome]:
    layer = work.case.layer

    def forward(x: Tensor) -> Tensor:
        y: Tensor = function(x) if layer else function(x, x, x, need_weights=False)[0]
        return y

    if work.case.mode == "inference":

        def infer() -> Outcome:
            with torch.inference_mode():
                return {"y": forward(work.x)}

        return infer
    x, dy = work.x.clone().requires_grad_(), work.dy
    wanted = [x, *module.parameters()]
    named = ["dx", *(f"d{name}" for name, _ in module.named_parameters())]

    def train() -> Outcome:
        y = forward(x)
        return {"y": y, **dict(zip(named, torch.autograd.grad(y, wanted, dy), strict=True))}

    return train


def make(case: TransformerCase, seed: int = 0) -> TransformerWork:
    return TransformerWork(case, seed)
