"""The peers of the pointwise part of a step: our kernels, and torch's fused cell without its products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedseq import registry

from .pointwise_work import PointwiseWork, drive
from .work import Outcome, Refusal, Runner


def ours(work: PointwiseWork) -> Runner | Refusal:
    """The kernels that the registry tries first where they are usable."""
    return triton(work) if registry.backends()["cuda"].missing() is not None else cuda(work)


def cuda(work: PointwiseWork) -> Runner | Refusal:
    from fusedseq.backends.cuda_cell import Step, pointwise_backward, pointwise_forward

    case = work.case
    step = Step(case.cell, work.gx, work.gh, None, None, work.h, work.c)
    if case.mode == "inference":

        def forward() -> Outcome:
            new = pointwise_forward(step, None, work.dtype, False)
            return {"h": new.h} if new.c is None else {"h": new.h, "c": new.c}

        return drive(forward)
    new = pointwise_forward(step, None, work.dtype, True)

    def backward() -> Outcome:
        d = pointwise_backward(step, None, new.kept, new.h, work.dh, work.dc)
        return {"dg": d.gates, "dinner": d.inner} if d.c is None else {"dg": d.gates, "dc": d.c}

    def results() -> Outcome:
        found = backward()
        inner = found.pop("dinner", None)
        # The specification has the gradients of r and z once.
        return found if inner is None else {"dg": torch.cat([found["dg"], inner.chunk(3, 1)[2]], 1)}

    return Runner(backward, results)


def triton(work: PointwiseWork) -> Runner | Refusal:
    if (why := registry.backends()["triton"].missing()) is not None:
        return Refusal(f"the Triton kernels are not usable: {why}")
    from fusedseq.backends.triton_cell import Step, pointwise_backward, pointwise_forward

    case = work.case
    step = Step(case.cell, work.gx, work.gh, None, None, work.h, work.c)
    if case.mode == "inference":

        def forward() -> Outcome:
            h, c, _ = pointwise_forward(step, None, work.dtype, False)
            return {"h": h} if c is None else {"h": h, "c": c}

        return drive(forward)
    h_new, _, kept = pointwise_forward(step, None, work.dtype, True)

    def backward() -> Outcome:
        dg, _, dc = pointwise_backward(step, None, kept, h_new, work.dh, work.dc, work.dtype)
        return {"dg": dg} if dc is None else {"dg": dg, "dc": dc}

    return drive(backward)


def fused(work: PointwiseWork) -> Runner | Refusal:
    """What torch.nn's cells run on a GPU after their products, all in one dtype."""
    case = work.case
    if case.device != "cuda":
        return Refusal("torch has a fused cell on a GPU only")
    if case.mode == "training":
        return Refusal("its backward saves other values and wants products of its own dtype")
    gx, gh = work.gx.to(work.dtype), work.gh.to(work.dtype)

    def forward() -> Outcome:
        if case.cell == "lstm":
            h, c, _ = torch.ops.aten._thnn_fused_lstm_cell(gx, gh, work.c)
            return {"h": h, "c": c}
        return {"h": torch.ops.aten._thnn_fused_gru_cell(gx, gh, work.h)[0]}

    return drive(forward)


BUILD: dict[str, Callable[[PointwiseWork], Runner | Refusal]] = {"fusedseq": ours, "torch": fused, "triton": triton}
