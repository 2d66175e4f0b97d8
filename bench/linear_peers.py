"""The peers of a linear layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F

from fusedseq.ops.linear import linear, takes

from .linear_work import LinearWork, drive
from .work import Refusal, Runner


def ours(work: LinearWork) -> Runner | Refusal:
    if not takes(work.x, work.weight, work.bias):
        return Refusal("the layer is torch's own here: see fusedseq.ops.linear")
    return drive(work, linear)


def eager(work: LinearWork) -> Runner | Refusal:
    return drive(work, F.linear)


BUILD: dict[str, Callable[[LinearWork], Runner | Refusal]] = {"fusedseq": ours, "torch": eager}
