"""A recurrent case made concrete: its tensors, torch.nn's module, and how a module is driven through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedseq.testing.compare import Error, judge

from .rnn_cases import RecurrentCase
from .work import Outcome, Runner, Work

# Streaming is compared over this many steps; one step from a state of zeros would not show a state that is lost.
STREAMED = 5


def options(case: RecurrentCase) -> dict[str, Any]:
    """Keyword arguments of the module, in torch.nn's words."""
    if case.cell:
        return {}
    given: dict[str, Any] = {"num_layers": case.layers, "bidirectional": case.bidirectional}
    return given | ({"proj_size": case.proj} if case.proj else {})


class RecurrentWork(Work):
    """With the weights, as a module of torch.nn."""

    def __init__(self, case: RecurrentCase, seed: int = 0) -> None:
        super().__init__(case)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(case.device, self.dtype)

        states = 2 if case.family.startswith("LSTM") else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = getattr(nn, case.family)(case.I, case.H, **options(case)).to(case.device, self.dtype)
        self.lengths = torch.tensor(case.lengths()) if case.packed else None
        if case.cell:
            self.x = normal(case.B, case.I)
            self.dy = [normal(case.B, case.H) for _ in range(states)]
            self.state = [normal(case.B, case.H) for _ in range(states)]
        else:
            self.x = normal(case.T, case.B, case.I)
            self.dy = [normal(case.T, case.B, case.D * case.R)]
            rows = case.layers * case.D
            self.state = [normal(rows, case.B, size) for size in (case.R, case.H)[:states]]

    def truth(self) -> Outcome:
        exact = RecurrentWork.__new__(RecurrentWork)
        exact.case, exact.dtype, exact.lengths = self.case, torch.float64, self.lengths
        exact.x, exact.dy = self.x.double(), [t.double() for t in self.dy]
        exact.state = [t.double() for t in self.state]
        exact.module = getattr(nn, self.case.family)(self.case.I, self.case.H, **options(self.case))
        exact.module.to(self.case.device, torch.float64).load_state_dict(self.module.state_dict())
        return drive(exact, exact.module).results()

    def yardstick(self) -> Outcome:
        module = getattr(nn, self.case.family)(self.case.I, self.case.H, **options(self.case))
        return drive(self, self.same_weights(module)).results()

    def errors(self, outcome: Outcome, truth: Outcome, yardstick: Outcome) -> list[Error]:
        return judge(outcome, truth, yardstick, self.dtype, terms=sum(self.case.lengths()))

    def same_weights(self, module: nn.Module) -> nn.Module:
        """`module` with a copy of the weights: peers that shared them would warm each other's caches."""
        module.to(self.case.device, self.dtype).load_state_dict(self.module.state_dict())
        return module.train(self.case.mode == "training")


def drive(work: RecurrentWork, module: Callable[..., Any], parameters: list[Tensor] | None = None) -> Runner:
    """Run a callable with the signature of torch.nn's module through the mode of the case.

    `parameters` are what training differentiates by, those of the module if it is one.
    """
    if parameters is None:
        assert isinstance(module, nn.Module)
        parameters = list(module.parameters())
    case = work.case
    if case.mode == "training":
        return _training(work, module, parameters)
    if case.cell or case.mode == "streaming":
        return _streaming(work, module)
    x = packed(work)

    def infer() -> Outcome:
        with torch.inference_mode():
            return {"y": module(x)[0]}

    return Runner(infer, lambda: _padded(infer()))


def packed(work: RecurrentWork, x: Tensor | None = None) -> Tensor | PackedSequence:
    """The input as the module takes it: packed if the case is."""
    x = work.x if x is None else x
    return x if work.lengths is None else pack_padded_sequence(x, work.lengths, enforce_sorted=False)


def _padded(outcome: dict[str, Any]) -> Outcome:
    return {
        name: pad_packed_sequence(value)[0] if isinstance(value, PackedSequence) else value
        for name, value in outcome.items()
    }


def _training(work: RecurrentWork, module: Callable[..., Any], parameters: list[Tensor]) -> Runner:
    """Forward and backward, with gradients of the input (and of a cell's state) and of all weights."""
    case = work.case
    # A packed input is a leaf of its own, so that packing is not part of the time.
    x = packed(work, work.x.detach().clone())
    leaf = (x.data if isinstance(x, PackedSequence) else x).requires_grad_()
    if isinstance(x, PackedSequence):
        x = x._replace(data=leaf)
    dy = [t.data if isinstance(t := packed(work, d), PackedSequence) else t for d in work.dy]
    state = [t.detach().clone().requires_grad_() for t in work.state] if case.cell else []
    wanted = [leaf, *state, *parameters]
    named = ["dx", *(f"dstate{i}" for i in range(len(state))), *(f"dw{i}" for i in range(len(parameters)))]

    def train() -> dict[str, Any]:
        if case.cell:
            out = module(x, tuple(state) if len(state) == 2 else state[0])
            y = out[0] if isinstance(out, tuple) else out
            heads = list(out) if isinstance(out, tuple) else [out]
        else:
            y = module(x)[0]
            heads = [y.data if isinstance(y, PackedSequence) else y]
        return {"y": y, **dict(zip(named, torch.autograd.grad(heads, wanted, dy), strict=True))}

    def results() -> Outcome:
        outcome = train()
        y = outcome["y"]
        outcome["y"] = y._replace(data=y.data.detach()) if isinstance(y, PackedSequence) else y.detach()
        return _padded(outcome)

    return Runner(train, results)


def _streaming(work: RecurrentWork, module: Callable[..., Any]) -> Runner:
    """One call is one step that takes up the state of the call before."""
    first: Any = tuple(work.state) if len(work.state) == 2 else work.state[0]
    x = work.x
    carried = first

    if work.case.cell:

        def step() -> Tensor:
            nonlocal carried
            carried = module(x, carried)
            return carried[0] if isinstance(carried, tuple) else carried

    else:

        def step() -> Tensor:
            nonlocal carried
            y, carried = module(x, carried)
            return y

    def results() -> Outcome:
        nonlocal carried
        carried = first
        with torch.inference_mode():
            return {"y": torch.stack([step() for _ in range(STREAMED)])}

    return Runner(step, results, turn=torch.inference_mode)


def make(case: RecurrentCase, seed: int = 0) -> RecurrentWork:
    return RecurrentWork(case, seed)
