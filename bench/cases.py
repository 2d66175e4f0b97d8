"""What is timed: each recurrent module of torch.nn beside ours, with the same weights and the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedseq

FAMILIES = ("LSTM", "GRU", "RNN")
MODES = ("inference", "training")
# B, T, I, H
SIZES = ((1, 100, 64, 128), (1, 256, 256, 256), (16, 100, 64, 128), (64, 50, 256, 256), (32, 128, 512, 512))


@dataclass(frozen=True)
class Case:
    family: str
    mode: str
    B: int
    T: int
    I: int
    H: int

    def __str__(self) -> str:
        return f"{self.family} {self.mode} B{self.B} T{self.T} I{self.I} H{self.H}"


def cases(families: tuple[str, ...] = FAMILIES, modes: tuple[str, ...] = MODES) -> Iterator[Case]:
    for family in families:
        for mode in modes:
            for size in SIZES:
                yield Case(family, mode, *size)


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def operations(case: Case) -> int:
    """Floating-point operations of the matrix products; training counts three times a forward pass."""
    products = 2 * case.T * case.B * GATES[case.family] * case.H * (case.I + case.H)
    return products * (3 if case.mode == "training" else 1)


class Work:
    """A case made concrete: `torch` and `fusedseq` are functions that do the same work, to be timed."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(case.T, case.B, case.I, generator=generator)
        self.dy = torch.randn(case.T, case.B, case.H, generator=generator)
        torch.manual_seed(seed)
        self.modules = {"torch": getattr(nn, case.family)(case.I, case.H)}
        self.modules["fusedseq"] = getattr(fusedseq, case.family)(case.I, case.H)
        self.modules["fusedseq"].load_state_dict(self.modules["torch"].state_dict())
        if case.mode == "training":
            self.x.requires_grad_()
        else:
            for module in self.modules.values():
                module.eval()

    def run(self, peer: str) -> Callable[[], list[Tensor]]:
        """One forward pass, in training with the backward pass; returns the results, by which peers are compared."""
        module, x, dy = self.modules[peer], self.x, self.dy
        wanted = [x, *module.parameters()]

        def infer() -> list[Tensor]:
            with torch.inference_mode():
                return [module(x)[0]]

        def train() -> list[Tensor]:
            y = module(x)[0]
            return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

        return train if self.case.mode == "training" else infer

    def check(self, tolerance: float = 1e-4) -> None:
        """Raises unless both peers give the same results: a wrong answer has no speed."""
        for ours, theirs in zip(self.run("fusedseq")(), self.run("torch")(), strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            if not error <= tolerance:
                raise AssertionError(f"{self.case}: fusedseq differs from torch.nn by {error:.1e} (relative norm)")
