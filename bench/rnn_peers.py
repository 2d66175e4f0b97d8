"""The peers of a recurrent case. Each takes it and gives a runner, or the reason why it does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fusedseq

from .rnn_cases import RecurrentCase
from .rnn_work import RecurrentWork, drive, options
from .work import Refusal, Runner

# TorchDynamo unrolls the loop over time; compiling takes about a second per step.
COMPILED_STEPS = 32
# Backward of a loop keeps some ten nodes and tensors per step.
LOOPED_STEPS = 4096


def ours(work: RecurrentWork) -> Runner | Refusal:
    case = work.case
    return drive(work, work.same_weights(getattr(fusedseq, case.family)(case.I, case.H, **options(case))))


def triton(work: RecurrentWork) -> Runner | Refusal:
    """Ours on the Triton kernels, beside whichever backend the registry takes."""
    if work.case.device != "cuda":
        return Refusal("its kernels are for a GPU")
    if (why := fusedseq.registry.backends()["triton"].missing()) is not None:
        return Refusal(f"not usable: {why}")
    runner = ours(work)
    if isinstance(runner, Refusal):
        return runner
    call, results = runner.call, runner.results

    def run(function: Callable[[], Any]) -> Any:
        with fusedseq.use_backend("triton"):
            return function()

    return replace(runner, call=lambda: run(call), results=lambda: run(results))


def padded(work: RecurrentWork) -> Runner | Refusal:
    """Ours on as many rows, all of them T steps long: what the rows' lengths save or cost."""
    if not work.case.packed:
        return Refusal("only packed cases have a padded run beside them")
    full = RecurrentWork(work.case.but(packed=False))
    runner = ours(full)
    return runner if isinstance(runner, Refusal) else replace(runner, judged_by=full)


def frozen(work: RecurrentWork) -> Runner | Refusal:
    """Ours with weights packed once, as inference engines keep them."""
    case = work.case
    if case.mode != "inference" or case.cell or case.T == 1:
        return Refusal("only inference over several steps packs weights that can be kept")
    module = work.same_weights(getattr(fusedseq, case.family)(case.I, case.H, **options(case)))
    return drive(work, fusedseq.freeze(module))


def eager(work: RecurrentWork) -> Runner | Refusal:
    case = work.case
    return drive(work, work.same_weights(getattr(nn, case.family)(case.I, case.H, **options(case))))


def compiled(work: RecurrentWork) -> Runner | Refusal:
    case = work.case
    steps = case.T * case.layers * case.D
    if not case.cell and case.packed:
        return Refusal("TorchDynamo breaks the graph at a PackedSequence")
    if steps > COMPILED_STEPS:
        limit = f"the {COMPILED_STEPS} that compile in reasonable time"
        return Refusal(f"torch.compile unrolls {steps} steps, more than {limit}")
    torch._dynamo.reset()
    module = work.same_weights(getattr(nn, case.family)(case.I, case.H, **options(case)))
    function = torch.compile(module, dynamic=False)
    with torch._dynamo.config.patch(allow_rnn=True):
        runner = drive(work, function, list(module.parameters()))
        try:
            with runner.turn():
                runner.call()
        except Exception as error:
            return Refusal(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    return runner


class Stepwise(nn.Module):
    """A loop over time around torch.nn's cells, with the interface of torch.nn's sequence module."""

    def __init__(self, case: RecurrentCase) -> None:
        super().__init__()
        make = getattr(nn, case.family + "Cell")
        self.cells = nn.ModuleList(make(case.I if layer == 0 else case.H, case.H) for layer in range(case.layers))
        self.lstm = case.family == "LSTM"

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:  # [T, B, I] -> [T, B, H]
        finals: list[Any] = []
        for layer, cell in enumerate(self.cells):
            carried: Any = None
            if state is not None:
                carried = tuple(s[layer] for s in state) if self.lstm else state[layer]
            outputs: list[Tensor] = []
            for step in x.unbind(0):
                carried = cell(step, carried)
                outputs.append(carried[0] if self.lstm else carried)
            x = torch.stack(outputs)
            finals.append(carried)
        if self.lstm:
            return x, tuple(torch.stack([final[i] for final in finals]) for i in (0, 1))
        return x, torch.stack(finals)


def stepwise(work: RecurrentWork) -> Runner | Refusal:
    case = work.case
    if case.cell:
        return Refusal("the case is a single step: torch.nn's cell is the peer `torch`")
    if case.packed or case.bidirectional or case.proj:
        return Refusal("torch.nn's cells have no packed rows, second direction or projection")
    if case.T > LOOPED_STEPS:
        return Refusal(f"{case.T} steps are more than the {LOOPED_STEPS} that a Python loop takes in reasonable time")
    module = Stepwise(case).to(case.device, work.dtype).train(case.mode == "training")
    with torch.no_grad():
        for mine, theirs in zip(module.parameters(), work.module.parameters(), strict=True):
            mine.copy_(theirs)
    return drive(work, module)


def onnxruntime(work: RecurrentWork) -> Runner | Refusal:
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return Refusal(f'{package} is not installed: pip install "fusedseq[bench]"')
    from . import rnn_onnx

    return rnn_onnx.build(work)


BUILD: dict[str, Callable[[RecurrentWork], Runner | Refusal]] = {
    "fusedseq": ours,
    "torch": eager,
    "onnxruntime": onnxruntime,
    "stepwise": stepwise,
    "compile": compiled,
    "frozen": frozen,
    "triton": triton,
    "padded": padded,
}
