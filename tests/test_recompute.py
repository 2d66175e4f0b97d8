"""Gates formed again in backward: the same gradients from fewer kept values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import fusedseq
from fusedseq.ops import scan
from fusedseq.testing.cases import DTYPES, Case, compact_cases
from fusedseq.testing.compare import check

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh")
MODULES = {
    "LSTM": {},
    "LSTM-proj": {"proj_size": 7},
    "LSTM-deep": {"bidirectional": True, "num_layers": 2},
    "GRU": {},
    "GRU-deep": {"bidirectional": True, "num_layers": 2},
    "GRU-before": {"reset_after": False},
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parity(backend: str, cell: str, dtype: torch.dtype) -> None:
    with fusedseq.use_backend(backend):
        for case in [*compact_cases(cell), Case.parse(cell, "T40B17I11H37-bi-resets")]:
            check(partial(scan, recompute=True), case, dtype)


def pair(name: str, dtype: torch.dtype) -> list[torch.nn.Module]:
    made = []
    for recompute in (False, True):
        torch.manual_seed(0)
        make = getattr(fusedseq, name.split("-")[0])
        made.append(make(5, 33, dtype=dtype, recompute_gates=recompute, **MODULES[name]))
    return made


def gradients(module: torch.nn.Module, x: Tensor, **options: Tensor) -> list[Tensor]:
    y = module(x, **options)[0]
    return torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """The sums run in forward's order and no state was rounded. Several chunks, rows of several lengths."""
    kept, recomputed = pair(name, dtype)
    x = torch.randn(300, 3, 5, dtype=dtype, requires_grad=True)
    for options in ({}, {"lengths": torch.tensor([300, 17, 0])}, {"resets": torch.rand(300, 3) < 0.1}):
        for a, b in zip(gradients(kept, x, **options), gradients(recomputed, x, **options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "full", "less"), [("LSTM", 5, 1), ("GRU", 4, 0), ("GRU-before", 3, 0)])
def test_what_is_kept(name: str, full: int, less: int) -> None:
    """Values per unit and step beside the output."""
    T, B, H = 50, 3, 33
    x = torch.randn(T, B, 5)
    for module, expected in zip(pair(name, torch.float32), (full, less), strict=True):
        parts: list[Tensor] = [x, *module.parameters()]
        known = {t.data_ptr() for t in parts}
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=kept: into.append(t) or t, lambda t: t):
            y = module(x)[0]
        sizes = [t.numel() for t in kept if t.data_ptr() not in known and t.data_ptr() != y.data_ptr()]
        assert sum(sizes) == expected * T * B * H


def test_compiled_and_differentiated_twice() -> None:
    _, module = pair("LSTM", torch.float64)
    x = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    eager = gradients(module, x)
    compiled = torch.compile(lambda t: module(t)[0].square().sum(), fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x), [x, *module.parameters()]), eager, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(lambda t: module(t)[0], (x,), nondet_tol=0)


def test_shown_in_repr_and_scripted_as_torch_does() -> None:
    module = fusedseq.GRUCell(3, 4)
    assert "recompute" not in repr(module)
    module = fusedseq.LSTM(3, 4, return_cells=True, recompute_gates=True)
    assert repr(module) == "LSTM(3, 4, return_cells=True, recompute_gates=True)"
    module = fusedseq.GRU(3, 4, reset_after=False, recompute_gates=True)
    assert repr(module) == "GRU(3, 4, reset_after=False, recompute_gates=True)"
    assert type(fusedseq.unfuse(fusedseq.LSTM(3, 4, recompute_gates=True)).model) is torch.nn.LSTM
