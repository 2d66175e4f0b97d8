"""The pointwise part of one step made concrete: its tensors and the specification's results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedseq.testing.compare import Error, judge

from .pointwise_cases import PointwiseCase
from .work import Outcome, Runner, Work


class PointwiseWork(Work):
    """Both products [B, G H] in float32, as a product of half types is summed; states and gradients in the dtype."""

    def __init__(self, case: PointwiseCase, seed: int = 0) -> None:
        super().__init__(case)
        generator = torch.Generator().manual_seed(seed)

        def normal(columns: int) -> Tensor:
            return torch.randn(case.B, columns, generator=generator).to(case.device, self.dtype)

        # Numbers that the dtype holds: torch's kernel wants them in it.
        self.gx, self.gh = (normal(case.gates * case.H).float() for _ in range(2))
        self.h, self.c, self.dh, self.dc = (normal(case.H) for _ in range(4))

    def truth(self) -> Outcome:
        return self._specification(torch.float64)

    def yardstick(self) -> Outcome:
        return {name: t.to(self.dtype) for name, t in self._specification(torch.float32).items()}

    def errors(self, outcome: Outcome, truth: Outcome, yardstick: Outcome) -> list[Error]:
        return judge(outcome, truth, yardstick, self.dtype)

    def _specification(self, dtype: torch.dtype) -> Outcome:
        gx, gh, h, c, dh, dc = (t.to(dtype) for t in (self.gx, self.gh, self.h, self.c, self.dh, self.dc))
        leaves = [t.requires_grad_() for t in (gx, gh, h, c)]
        if self.case.cell == "lstm":
            i, f, g, o = (gx + gh).chunk(4, 1)
            c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h_new = o.sigmoid() * c_new.tanh()
            if self.case.mode == "inference":
                return {"h": h_new.detach(), "c": c_new.detach()}
            dg, _, _, dc_past = torch.autograd.grad((h_new, c_new), leaves, (dh, dc), allow_unused=True)
            return {"dg": dg, "dc": dc_past}
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, 1), gh.chunk(3, 1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        h_new = n + z * (h - n)
        if self.case.mode == "inference":
            return {"h": h_new.detach()}
        dg, dgh, _, _ = torch.autograd.grad(h_new, leaves, dh, allow_unused=True)
        return {"dg": torch.cat([dg, dgh.chunk(3, 1)[2]], 1)}


def drive(call: Callable[[], Outcome]) -> Runner:
    return Runner(call, call)


def make(case: PointwiseCase, seed: int = 0) -> PointwiseWork:
    return PointwiseWork(case, seed)
