"""Steps that repeat take a short way past all checks: with the same bits, and only where nothing watches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedseq
from fusedseq import registry

I, H, B = 5, 19, 3
CELLS = {
    "LSTMCell": {},
    "LSTMCell-nobias": {"bias": False},
    "GRUCell": {},
    "GRUCell-before": {"reset_after": False},
    "RNNCell": {},
    "RNNCell-relu": {"nonlinearity": "relu"},
}
LAYERS = {
    "LSTM": {},
    "LSTM-deep": {"num_layers": 3},
    "LSTM-both": {"bidirectional": True, "num_layers": 3},
    "LSTM-proj": {"proj_size": 7, "num_layers": 2, "bidirectional": True},
    "LSTM-nobias": {"bias": False, "proj_size": 4},
    "LSTM-first": {"batch_first": True, "num_layers": 2},
    "GRU": {},
    "GRU-both": {"bidirectional": True, "num_layers": 2},
    "GRU-before": {"reset_after": False, "num_layers": 2},
    "RNN": {"num_layers": 2},
    "RNN-relu": {"nonlinearity": "relu", "bidirectional": True, "num_layers": 2},
}


def make(name, options, dtype=torch.float32):
    torch.manual_seed(0)
    return getattr(fusedseq, name.split("-")[0])(I, H, dtype=dtype, **options)


def start(module, dtype=torch.float32, batch=B):
    """The input of a step and a state to begin with."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    if isinstance(module, torch.nn.RNNCellBase):
        h = draw(batch, H)
        return draw(batch, I), (h, draw(batch, H)) if isinstance(module, torch.nn.LSTMCell) else h
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = draw(count, batch, module.proj_size or H)
    x = draw(batch, 1, I) if module.batch_first else draw(1, batch, I)
    return x, (h, draw(count, batch, H)) if isinstance(module, torch.nn.LSTM) else h


def flat(value):
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


def state_of(module, out):
    return out if isinstance(module, torch.nn.RNNCellBase) else out[1]


def steps(module, x, hx, count):
    """The results of `count` steps, each from the state of the one before."""
    results = []
    for _ in range(count):
        out = module(x, hx)
        results.append(flat(out))
        hx = state_of(module, out)
    return results


def ready(module):
    """The module after it has learned that steps repeat."""
    x, hx = start(module)
    with torch.no_grad():
        steps(module, x, hx, 3)
    assert module._repeat is not None
    return x, hx


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*CELLS, *LAYERS])
def test_same_bits_as_the_long_way(name, mode, dtype):
    options = CELLS.get(name, LAYERS.get(name, {}))
    short, long = make(name, options, dtype), make(name, options, dtype)
    long._expect = lambda *a: None
    x, hx = start(short, dtype)
    with mode():
        ours, theirs = steps(short, x, hx, 8), steps(long, x, hx, 8)
    assert short._repeat is not None and long._repeat is None
    for a, b in zip(ours, theirs, strict=True):
        for u, v in zip(a, b, strict=True):
            assert u.shape == v.shape and u.dtype == v.dtype and torch.equal(u, v)


@pytest.mark.parametrize("name", ["LSTMCell", "LSTM-both"])
def test_results_are_new_tensors(name):
    module = make(name, {**CELLS, **LAYERS}[name])
    x, hx = ready(module)
    with torch.no_grad():
        first = flat(module(x, hx))
        kept = [t.clone() for t in first]
        second = flat(module(x + 1, hx))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    addresses = [t.data_ptr() for t in (*first, *second, x, *flat(hx))]
    assert len(set(addresses)) == len(addresses)


def test_taken_only_from_the_second_call_of_a_kind():
    module = make("LSTMCell", {})
    x, hx = start(module)
    with torch.no_grad():
        module(x, hx)
        assert module._repeat is None
        module(x, hx)
        assert module._repeat is not None


def short_ways(module, monkeypatch):
    """A list that grows with every step that takes the short way."""
    taken = []
    inner = type(module._repeat).__call__

    def watched(self, *args):
        out = inner(self, *args)
        if out is not None:
            taken.append(args[0])
        return out

    monkeypatch.setattr(type(module._repeat), "__call__", watched)
    return taken


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "LSTM", "GRU-both"])
def test_gives_way(name, monkeypatch):
    """Whatever would have to see the call makes it take the long way, and the results stay right."""
    options = {**CELLS, **LAYERS}[name]
    module, fresh = make(name, options), make(name, options)
    x, hx = ready(module)
    taken = short_ways(module, monkeypatch)

    def compare(x, hx, short):
        taken.clear()
        ours = flat(module(x, hx))
        assert bool(taken) is short
        fresh._repeat = None
        for a, b in zip(ours, flat(fresh(x, hx)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        return ours

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        compare(x, hx, True)
        bigger = start(module, batch=B + 1)
        compare(*bigger, False)
        compare(x.expand(*x.shape[:-1], I).transpose(0, 0).clone()[..., :], hx, True)
        compare(torch.stack([x, x], -1)[..., 0], hx, False)  # a strided row
        with torch.autocast("cpu", torch.bfloat16):
            assert compare(x, hx, False)[0].dtype == torch.bfloat16
        with fusedseq.use_backend("reference"):
            taken.clear()
            module(x, hx)
            assert not taken
        with registry.record() as ran:
            compare(x, hx, False)
        assert len(ran) >= 2
        with Mode():
            compare(x, hx, False)
        with torch.device("cpu"):  # a function mode
            compare(x, hx, False)
        for _ in range(64):
            module(x, hx)
        compare(x, hx, True)
    out = compare(x, hx, False)
    assert out[0].requires_grad
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        compare(x, hx, False)
    with torch.no_grad():
        taken.clear()
        torch.func.vmap(lambda v: flat(module(v, hx))[0])(torch.stack([x, x]))
        assert not taken
    with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
        module(x.double(), hx)
    registry.reload()
    with torch.no_grad():
        compare(x, hx, False)


def test_weights_are_read_anew():
    module = make("GRUCell", {})
    x, h = ready(module)
    with torch.no_grad():
        before = module(x, h)
        module.weight_ih.add_(1)
        assert not torch.equal(before, module(x, h))
        module.load_state_dict(make("GRUCell", {}).state_dict())
        assert torch.equal(before, module(x, h))
        module.weight_hh.data = torch.zeros_like(module.weight_hh)
        assert not torch.equal(before, module(x, h))
        module.bias_ih.data = torch.zeros(3 * H + 1)
        with pytest.raises(RuntimeError, match=r"bias|shape|size"):
            module(x, h)
        module.bias_ih.data = torch.zeros(6 * H)[::2]
        expected = torch.nn.GRUCell(I, H)
        expected.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x, h), expected(x, h))


def test_options_that_change():
    cell = make("RNNCell", {})
    x, h = ready(cell)
    with torch.no_grad():
        tanh = cell(x, h)
        cell.nonlinearity = "relu"
        assert not torch.equal(tanh, cell(x, h))
        assert (cell(x, h) >= 0).all()
    deep = make("LSTM", {"num_layers": 2, "dropout": 1.0})
    deep.eval()
    x, hx = ready(deep)
    with torch.no_grad():
        still = deep(x, hx)[0]
        deep.train()
        assert not torch.equal(still, deep(x, hx)[0])
        deep.dropout = 0.0
        assert torch.equal(still, deep(x, hx)[0])


def test_kinds_of_calls_in_turns(monkeypatch):
    module = make("LSTMCell", {})
    ready(module)
    taken = short_ways(module, monkeypatch)
    one, many = start(module, batch=1), start(module, batch=9)
    expected = [flat(make("LSTMCell", {})(*a)) for a in (one, many)]
    with torch.no_grad():
        for _ in range(20):
            for a, e in zip((one, many), expected, strict=True):
                assert all(torch.equal(u, v) for u, v in zip(flat(module(*a)), e, strict=True))
    assert len(taken) >= 15  # one of the two kinds at the least


def test_copies_do_not_share_it():
    module = make("LSTM", {"num_layers": 2})
    x, hx = ready(module)
    with torch.no_grad():
        expected = flat(module(x, hx))
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
            got = [flat(twin(x, hx)) for _ in range(4)][-1]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert copy.deepcopy(module)._repeat is None


def test_unfused_and_scripted_modules_do_not_keep_it():
    cell = make("LSTMCell", {})
    x, hx = ready(cell)
    with torch.no_grad():
        torch.testing.assert_close(flat(torch.jit.script(cell)(x, hx)), flat(cell(x, hx)))
    module = make("LSTM", {})
    ready(module)
    fusedseq.unfuse(module)
    assert type(module) is torch.nn.LSTM and "_repeat" not in module.__dict__ and "_asked" not in module.__dict__


def test_compiled_after_it_was_prepared():
    module = make("LSTMCell", {})
    x, hx = ready(module)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for a, b in zip(compiled(x, hx), module(x, hx), strict=True):
            torch.testing.assert_close(a, b)


def test_without_the_guard_every_call_takes_the_long_way(monkeypatch):
    monkeypatch.setattr("fusedseq.ops.repeat._Guards", None)
    module = make("LSTMCell", {})
    x, hx = start(module)
    with torch.no_grad():
        results = steps(module, x, hx, 4)
    assert module._repeat is None and all(t.isfinite().all() for r in results for t in r)


def test_a_refused_step_names_the_argument():
    from fusedseq import _cpu
    from fusedseq.backends import cpu

    with pytest.raises(ValueError, match="T = 1"):
        _cpu.Step(cpu._local, 0, 0, (2, 1, 3, 4, 4, 1), 3, 1, True, False)
    step = _cpu.Step(cpu._local, 0, 0, (1, 1, 3, 4, 4, 1), 3, 1, True, False)
    t = torch.zeros(4)
    run = step.run
    del step  # what it belongs to stays alive
    with pytest.raises(TypeError, match="list of 4 tensors"):
        run(1, t, t, t, t, t, t, [t, t], None)
    with pytest.raises(AttributeError, match="data_ptr"):
        run(1, 5, t, t, t, t, t, [t, t, t, t], None)
    with pytest.raises(TypeError, match="9 arguments, got 1"):
        run(1)
    with pytest.raises(TypeError, match="int"):
        run("1", t, t, t, t, t, t, [t, t, t, t], None)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_bad_arguments_after_a_learned_step_are_torchs_errors(name):
    module, stock = make(name, {}), getattr(torch.nn, name)(I, H)
    x, hx = ready(module)
    h = hx[0] if isinstance(hx, tuple) else hx
    bad = [(x.tolist(), hx), (None, hx), (x, 5), (x, [h] * 3), (x, (h, 5)), (x.double(), hx)]
    bad += [(x[..., 1:], hx), (x, h[..., 1:])]
    for arguments in bad:
        with torch.no_grad(), pytest.raises(Exception) as ours:
            module(*arguments)
        with torch.no_grad(), pytest.raises(Exception) as theirs:
            stock(*arguments)
        assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value)), arguments[1]


def test_a_state_in_a_list_repeats_too(monkeypatch):
    module = make("LSTM", {})
    x, hx = ready(module)
    taken = short_ways(module, monkeypatch)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(flat(module(x, hx)), flat(module(x, list(hx))), strict=True))
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_more_than_a_plain_step_takes_the_long_way(name, monkeypatch):
    module = make(name, {})
    x, hx = ready(module)
    taken = short_ways(module, monkeypatch)
    with torch.no_grad():
        for given in ({"resets": torch.zeros(1, B, dtype=torch.bool)}, {"lengths": torch.ones(B, dtype=torch.int64)}):
            torch.testing.assert_close(flat(module(x, hx, **given)), flat(module(x, hx)))
        assert len(taken) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_without_a_state(name, mode, monkeypatch):
    module, long = make(name, LAYERS[name]), make(name, LAYERS[name])
    long._expect = lambda *a: None
    x, _ = start(module)
    with mode():
        for _ in range(3):
            module(x)
        taken = short_ways(module, monkeypatch)
        for _ in range(2):
            for a, b in zip(flat(module(x)), flat(long(x)), strict=True):
                assert torch.equal(a, b)
        assert len(taken) == 2
        ours, theirs = module(x), long(x)
        for a, b in zip(flat(module(x, ours[1])), flat(long(x, theirs[1])), strict=True):
            assert torch.equal(a, b)


def test_a_step_without_a_state_after_steps_with_one(monkeypatch):
    module = make("GRU", {})
    x, hx = ready(module)
    taken = short_ways(module, monkeypatch)
    with torch.no_grad():
        got, expected = flat(module(x)), flat(module(x, torch.zeros_like(hx)))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(taken) == 2
