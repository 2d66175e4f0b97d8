"""The peers of a module of the Transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import fusedseq

from .transformer_work import TransformerWork, drive
from .work import Refusal, Runner


def ours(work: TransformerWork) -> Runner | Refusal:
    return drive(work, work.same_weights(fusedseq))


def eager(work: TransformerWork) -> Runner | Refusal:
    """torch.nn, in evaluation with its fused layer."""
    return drive(work, work.same_weights(nn))


def compiled(work: TransformerWork) -> Runner | Refusal:
    torch._dynamo.reset()
    runner = drive(work, work.same_weights(nn), lambda module: torch.compile(module, dynamic=False))
    try:
        runner.call()
    except Exception as error:
        return Refusal(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    return runner


BUILD: dict[str, Callable[[TransformerWork], Runner | Refusal]] = {
    "fusedseq": ours,
    "torch": eager,
    "compile": compiled,
}
