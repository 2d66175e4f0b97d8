"""Frozen modules: the same bits without packing the weights anew, also after the weights have changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import fusedseq
from fusedseq import _cpu
from fusedseq.backends import cpu

MODULES = {
    "LSTM": {},
    "LSTM-deep": {"num_layers": 2, "bidirectional": True},
    "LSTM-proj": {"proj_size": 7},
    "LSTM-nobias": {"bias": False, "batch_first": True},
    "GRU": {"num_layers": 2},
    "GRU-before": {"reset_after": False},
    "RNN": {"bidirectional": True},
}


def make(name: str, dtype: torch.dtype = torch.float32, hidden: int = 37) -> fusedseq.LSTM:
    torch.manual_seed(0)
    module: fusedseq.LSTM = getattr(fusedseq, name.split("-")[0])(5, hidden, dtype=dtype, **MODULES[name])
    return module


def run(module: torch.nn.Module, x: Tensor, **options: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y, state = module(x, **options)
    return [y, *(state if isinstance(state, tuple) else [state])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a cell with every layer that is packed for keeping."""
    made: list[str] = []
    inner = cpu.pack

    def watched(cell: str, weights: list[Tensor], bidirectional: bool) -> object:
        panels = inner(cell, weights, bidirectional)
        made.extend([cell] if panels is not None else [])
        return panels

    monkeypatch.setattr(cpu, "pack", watched)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_same_bits(name: str, dtype: torch.dtype, packs: list[str]) -> None:
    plain, frozen = make(name, dtype), fusedseq.freeze(make(name, dtype))
    x = torch.randn(9, 4, 5).to(dtype)
    for options in ({}, {"lengths": torch.tensor([9, 2, 0, 5][: x.shape[0 if plain.batch_first else 1]])}):
        if plain.batch_first and options:
            options = {"lengths": torch.tensor([4, 2, 0, 1, 1, 3, 2, 4, 4])}
        for _ in range(2):
            assert same(run(plain, x, **options), run(frozen, x, **options))
    assert len(packs) == plain.num_layers
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            assert same(run(plain, x), run(frozen, x))
        finally:
            torch.set_num_threads(2)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", MODULES)
def test_same_bits_however_the_units_are_divided(name: str, threads: int) -> None:
    """Slices of threads begin inside of panels: 150 units are ten vectors, so 200 steps are worth dividing."""
    plain = make(name, hidden=150)
    frozen = fusedseq.freeze(make(name, hidden=150))
    for batch in (1, 9, 30):
        x = torch.randn(batch, 200, 5) if plain.batch_first else torch.randn(200, batch, 5)
        before = torch.get_num_threads()
        try:
            run(frozen, x[:2])  # packed by other threads than those that read it
            torch.set_num_threads(threads)
            assert same(run(plain, x), run(frozen, x))
        finally:
            torch.set_num_threads(before)


def test_changed_weights_are_packed_again(packs: list[str]) -> None:
    plain, frozen = make("LSTM"), fusedseq.freeze(make("LSTM"))
    x = torch.randn(6, 3, 5)

    def agree() -> None:
        plain.load_state_dict(frozen.state_dict())
        assert same(run(plain, x), run(frozen, x))

    agree()
    with torch.no_grad():
        frozen.weight_hh_l0.mul_(0.5)
    agree()
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    frozen(x)[0].sum().backward()
    optimizer.step()
    agree()
    frozen.load_state_dict(make("LSTM").state_dict())
    agree()
    frozen.bias_ih_l0 = torch.nn.Parameter(torch.ones(4 * 37))
    agree()
    frozen.weight_ih_l0.data = torch.zeros(4 * 37, 5)
    agree()
    assert len(packs) == 6
    agree()
    assert len(packs) == 6
    frozen.double()
    plain.double()
    x = x.double()
    agree()


def test_gradients_and_single_steps_do_not_use_it(packs: list[str]) -> None:
    frozen = fusedseq.freeze(make("GRU"))
    x = torch.randn(6, 3, 5)
    frozen(x)[0].sum().backward()
    run(frozen, x[:1])
    assert packs == []


def test_copies_pack_their_own_and_unfusing_forgets(packs: list[str]) -> None:
    frozen = fusedseq.freeze(make("LSTM"))
    x = torch.randn(6, 3, 5)
    expected = run(frozen, x)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert same(run(twin, x), expected)
    assert len(packs) == 3
    assert fusedseq.unfreeze(frozen) is frozen
    assert same(run(frozen, x), expected) and len(packs) == 3
    fusedseq.unfuse(fusedseq.freeze(frozen))
    assert type(frozen) is torch.nn.LSTM and "_frozen" not in frozen.__dict__


def test_another_instruction_set_ignores_it() -> None:
    frozen = fusedseq.freeze(make("LSTM"))
    x = torch.randn(6, 3, 5)
    run(frozen, x)
    before = _cpu.isa()
    _cpu.set_isa(_cpu.isas()[0])
    try:
        assert same(run(frozen, x), run(make("LSTM"), x))
    finally:
        _cpu.set_isa(before)


def test_other_backends_and_compiled_code_do_without() -> None:
    frozen = fusedseq.freeze(make("LSTM"))
    x = torch.randn(6, 3, 5)
    expected = run(frozen, x)
    with fusedseq.use_backend("reference"):
        torch.testing.assert_close(run(frozen, x), expected)
    compiled = torch.compile(frozen, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, x), expected)


def test_inference_weights_are_never_kept(packs: list[str]) -> None:
    with torch.inference_mode():
        frozen = fusedseq.freeze(make("LSTM"))
        x = torch.randn(6, 3, 5)
        frozen(x)
        frozen.weight_hh_l0.zero_()
        plain = make("LSTM")
        plain.weight_hh_l0.zero_()
        assert torch.equal(frozen(x)[0], plain(x)[0])
    assert packs == []


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"freeze expects a torch.nn.Module, got str"):
        fusedseq.freeze("lstm")  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"model: expected a fused RNN, LSTM or GRU"):
        fusedseq.unfreeze(torch.nn.LSTM(2, 3))
    module = make("LSTM")
    panels = cpu.pack("lstm", list(module.parameters()), False)
    other = fusedseq.LSTM(4, 37)
    with pytest.raises(ValueError, match="panels: they were packed for another"):
        cpu.scan_forward(
            "lstm", torch.zeros(2, 1, 4), None, None, list(other.parameters()), False, False, None, None, None, False,
            0, panels,
        )  # fmt: skip
