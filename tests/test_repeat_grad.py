"""A cell's steps that repeat while autograd records: the same bits, and every way in which a backward may differ."""

from __future__ import annotations

import copy

import pytest
import torch
from test_repeat import CELLS, B, flat, make, start
from torch.utils.checkpoint import checkpoint

import fusedseq
from fusedseq import registry


def node(t):
    return t.grad_fn.name()


def leaves(module, dtype=torch.float32, batch=B):
    """Input and state of a step, all of which require gradients."""
    x, hx = start(module, dtype, batch)
    for t in (x, *flat(hx)):
        t.requires_grad_()
    return x, hx


def upstream(out):
    g = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=g).to(t.dtype) for t in flat(out)]


def unroll(module, x, hx, count):
    """Outputs of `count` steps in a row, and the gradients of everything."""
    wanted = [x, *flat(hx), *module.parameters()]
    outs, state = [], hx
    for _ in range(count):
        state = module(x, state)
        outs += flat(state)
    return outs, torch.autograd.grad(outs, wanted, upstream(outs))


def ready(name, dtype=torch.float32):
    """A module that has learned that steps repeat, and its arguments."""
    module = make(name, CELLS[name], dtype)
    x, hx = leaves(module, dtype)
    for _ in range(3):
        module(x, hx)
    assert node(flat(module(x, hx))[0]) == "_RecordedBackward"
    return module, x, hx


def long_way(module):
    twin = copy.deepcopy(module)
    twin._expect = lambda *a: None
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_same_bits_as_the_long_way(name, dtype):
    module, x, hx = ready(name, dtype)
    long = long_way(module)
    ours, theirs = unroll(module, x, hx, 5), unroll(long, x, hx, 5)
    assert {node(t) for t in ours[0]} == {"_RecordedBackward"}
    assert "_RecordedBackward" not in {node(t) for t in theirs[0]}
    for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", CELLS)
def test_second_derivatives(name):
    module, x, hx = ready(name, torch.float64)
    parameters = list(module.parameters())

    def step(x, *state_and_weights):
        n = len(flat(hx))
        state = state_and_weights[:n]
        weights = dict(zip(dict(module.named_parameters()), state_and_weights[n:], strict=True))
        originals = dict(module._parameters)
        module._parameters.update(weights)
        try:
            return tuple(flat(module(x, state if n == 2 else state[0])))
        finally:
            module._parameters.update(originals)

    args = (x, *flat(hx), *parameters)
    assert node(step(*args)[0]) == "_RecordedBackward"
    assert torch.autograd.gradgradcheck(step, args, fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "state", "weights", "one weight"])
def test_gradients_of_some(wanted):
    module = make("LSTMCell", {})
    x, (h, c) = start(module)
    module.requires_grad_(wanted == "weights")
    chosen = {"x": [x], "state": [h, c], "weights": list(module.parameters()), "one weight": [module.weight_hh]}[wanted]
    for t in chosen:
        t.requires_grad_()
    for _ in range(3):
        out = module(x, (h, c))
    assert node(out[0]) == "_RecordedBackward"
    theirs = long_way(module)(x, (h, c))
    pick = list(chosen)
    grads = torch.autograd.grad(out, pick, upstream(out))
    if wanted in ("weights", "one weight"):
        twin = long_way(module)
        theirs = twin(x, (h, c))
        pick = [p for p in twin.parameters() if p.requires_grad]
    for a, b in zip(grads, torch.autograd.grad(theirs, pick, upstream(out)), strict=True):
        assert torch.equal(a, b)


def test_shapes_of_the_upstream_gradient():
    module, x, hx = ready("LSTMCell")
    wanted = [x, *hx]
    for heads in ([0], [1], [0, 1]):
        dy = [torch.randn(hx[0].shape[1], B).t() for _ in heads]  # strided
        results = []
        for m in (module, long_way(module)):
            out = m(x, hx)
            results.append(torch.autograd.grad([out[i] for i in heads], wanted, dy))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    total = module(x, hx)[0].sum()  # an expanded gradient
    expected = long_way(module)(x, hx)[0].sum()
    ours, theirs = torch.autograd.grad(total, wanted), torch.autograd.grad(expected, wanted)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_strided_rows_of_the_input():
    module = make("GRUCell", {})
    wide, h = torch.randn(B, 9, requires_grad=True), start(module)[1]
    results = []
    for m in (module, long_way(module)):
        for _ in range(4):
            out = m(wide[:, 2:7], h)
        results.append(torch.autograd.grad(out, [wide, *m.parameters()], upstream(out)))
    assert node(module(wide[:, 2:7], h)) == "_RecordedBackward"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backward_twice_and_after_a_write():
    module, x, h = ready("GRUCell")
    out = module(x, h)
    first = torch.autograd.grad(out, [x, h], torch.ones_like(out), retain_graph=True)
    again = torch.autograd.grad(out, [x, h], torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, [x, h], torch.ones_like(out))
    out = module(x, h)
    with torch.no_grad():
        module.weight_ih.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gives_way():
    """What would have to see the call, or the tensors it keeps, makes it take the long way."""
    module, x, hx = ready("LSTMCell")

    def short(*args):
        return node(module(*args)[0]) == "_RecordedBackward"

    assert short(x, hx)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert not short(x, hx)
    with torch.autocast("cpu", torch.bfloat16):
        assert not short(x, hx)
    with fusedseq.use_backend("reference"):
        assert not short(x, hx)
    with registry.record() as ran:
        assert not short(x, hx)
    assert len(ran) == 1 and ran[0].call.grad
    with torch.device("cpu"):
        assert not short(x, hx)
    assert not short(*leaves(module, batch=B + 1))
    assert short(x, hx)
    with torch.no_grad():
        assert module(x, hx)[0].grad_fn is None
    module.requires_grad_(False)
    assert not short(x, hx)
    x, hx = start(module)
    for _ in range(4):
        assert module(x, hx)[0].grad_fn is None


def test_states_with_and_without_gradients_in_turns():
    """A loop over a sequence begins with a state that needs none; both kinds of steps repeat."""
    module = make("RNNCell", {})
    x, first = start(module)
    for _ in range(40):
        h = first
        names = []
        for _ in range(4):
            h = module(x, h)
            names.append(node(h))
    assert names == ["_RecordedBackward"] * 4
    with torch.no_grad():
        for _ in range(3):
            assert module(x, first).grad_fn is None
    assert module._repeat is not None


def test_checkpoint_and_compile():
    module, x, h = ready("GRUCell")
    expected = torch.autograd.grad(module(x, h), [x, *module.parameters()], torch.ones(h.shape))
    out = checkpoint(module, x, h, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out, [x, *module.parameters()], torch.ones(h.shape)), expected, strict=True):
        assert torch.equal(a, b)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(x, h), [x, *module.parameters()], torch.ones(h.shape))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_halves_take_the_long_way():
    module = make("GRUCell", {}, torch.bfloat16)
    x, h = leaves(module, torch.bfloat16)
    for _ in range(5):
        out = module(x, h)
    assert node(out) != "_RecordedBackward"


def test_a_refused_backward_names_the_argument():
    from fusedseq import _cpu
    from fusedseq.backends import cpu

    t = torch.zeros(4)
    with pytest.raises(TypeError, match="one layer and direction"):
        _cpu.Step(cpu._local, 0, 0, (1, 1, 3, 4, 4, 1), 3, 2, True, False).backward(1, *[t] * 7, [t] * 4, t, t, t, ())
    step = _cpu.Step(cpu._local, 0, 0, (1, 1, 3, 4, 4, 1), 3, 1, True, False)
    with pytest.raises(TypeError, match="dweights: expected a list of 4 tensors"):
        step.backward(1, *[t] * 7, [t] * 4, t, t, t, [t])
