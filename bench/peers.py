"""Who is timed: fusedseq and its peers. Each takes a case and gives a runner, or the reason why it does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fusedseq

from .cases import Case
from .work import Refusal, Runner, Work, drive, options

# TorchDynamo unrolls the loop over time; compiling takes about a second per step.
COMPILED_STEPS = 32
# Backward of a loop keeps some ten nodes and tensors per step.
LOOPED_STEPS = 4096


@dataclass(frozen=True)
class Peer:
    """`build` may be slow: it is called once per case, before anything is timed."""

    about: str
    build: Callable[[Work], Runner | Refusal]
    rival: bool = True  # takes part in the choice of the best peer


def ours(work: Work) -> Runner | Refusal:
    case = work.case
    return drive(work, work.same_weights(getattr(fusedseq, case.family)(case.I, case.H, **options(case))))


def padded(work: Work) -> Runner | Refusal:
    """Ours on as many rows, all of them T steps long: what the rows' lengths save or cost."""
    if not work.case.packed:
        return Refusal("only packed cases have a padded run beside them")
    return ours(Work(replace(work.case, packed=False)))


def frozen(work: Work) -> Runner | Refusal:
    """Ours with weights packed once, as inference engines keep them."""
    case = work.case
    if case.mode != "inference" or case.cell or case.T == 1:
        return Refusal("only inference over several steps packs weights that can be kept")
    module = work.same_weights(getattr(fusedseq, case.family)(case.I, case.H, **options(case)))
    return drive(work, fusedseq.freeze(module))


def eager(work: Work) -> Runner | Refusal:
    case = work.case
    return drive(work, work.same_weights(getattr(nn, case.family)(case.I, case.H, **options(case))))


def compiled(work: Work) -> Runner | Refusal:
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
            runner.call()
        except Exception as error:
            return Refusal(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    return runner


class Stepwise(nn.Module):
    """A loop over time around torch.nn's cells, with the interface of torch.nn's sequence module."""

    def __init__(self, case: Case) -> None:
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


def stepwise(work: Work) -> Runner | Refusal:
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


def onnxruntime(work: Work) -> Runner | Refusal:
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return Refusal(f'{package} is not installed: pip install "fusedseq[bench]"')
    from . import onnx_peer

    return onnx_peer.build(work)


PEERS: dict[str, Peer] = {
    "fusedseq": Peer("this project", ours, rival=False),
    "torch": Peer("torch.nn, eager; on a GPU that is cuDNN, and named so in results", eager),
    "onnxruntime": Peer("ONNX Runtime, inference", onnxruntime),
    "stepwise": Peer("a Python loop around torch.nn's cells", stepwise),
    "compile": Peer("torch.compile of torch.nn; compiles for up to half a minute per case", compiled),
    "frozen": Peer("fusedseq with `freeze`: weights packed before the clock runs", frozen, rival=False),
    "padded": Peer("fusedseq on padded rows, beside a packed case", padded, rival=False),
}
# Compiling takes longer than all else, and not everyone can freeze: these must be asked for.
DEFAULT_PEERS = tuple(name for name in PEERS if name not in ("compile", "frozen"))
# Of ours, beside some cases; not a word about all the others.
COMPANIONS = ("frozen", "padded")


def shown(name: str, case: Case) -> str:
    """The name of a peer in results."""
    return "cudnn" if name == "torch" and case.device == "cuda" else name
