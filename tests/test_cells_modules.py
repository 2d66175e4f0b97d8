"""RNNCell, LSTMCell and GRUCell against their torch.nn namesakes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fusedseq.nn as fnn

I, H, B = 3, 5, 4
KINDS = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def pair(kind, **kwargs):
    name, options = KINDS[kind]
    made = []
    for namespace in (nn, fnn):
        torch.manual_seed(0)
        made.append(getattr(namespace, name)(I, H, **options, **kwargs))
    return made


def flat(result):
    return list(result) if isinstance(result, tuple) else [result]


def states(module, *shape, dtype=None):
    generator = torch.Generator().manual_seed(1)
    dtype = dtype or module.weight_ih.dtype
    made = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]
    return tuple(made) if isinstance(module, nn.LSTMCell) else made[0]


def outcome(module, x, hx):
    """Outputs and gradients of three steps."""
    module.zero_grad()
    state = hx
    for _ in range(3):
        state = module(x, state)
    outs = flat(state)
    generator = torch.Generator().manual_seed(3)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outs)
    wrt = [x, *(flat(hx) if hx is not None else []), *module.parameters()]
    return [*outs, *torch.autograd.grad(loss, wrt)]


@kinds
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.float64}])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
def test_steps_and_gradients(kind, options, batched, given):
    stock, ours = pair(kind, **options)
    lead = (B,) if batched else ()
    x = torch.randn(*lead, I, dtype=ours.weight_ih.dtype, requires_grad=True)
    hx = states(ours, *lead, H) if given else None
    for a, b in zip(outcome(ours, x, hx), outcome(stock, x, hx), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_repr_copies(kind, bias):
    stock, ours = pair(kind, bias=bias)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(B, I)
    want = flat(ours(x))
    for other in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(torch.equal(a, b) for a, b in zip(flat(other(x)), want, strict=True))


def bad_calls(module):
    lstm = isinstance(module, nn.LSTMCell)
    x = torch.randn(B, I)

    def also(h):
        return (h, h) if lstm else h

    cases = {
        "dimensions": (torch.randn(2, B, I),),
        "scalar": (torch.tensor(1.0),),
        "features": (torch.randn(B, I + 1),),
        "features, unbatched": (torch.randn(I + 1),),
        "dtype": (x.double(),),
        "state, dimensions": (x, also(torch.zeros(1, B, H))),
        "state, batch": (x, also(torch.zeros(B + 1, H))),
        "state, features": (x, also(torch.zeros(B, H + 1))),
        "state, unbatched": (x, also(torch.zeros(H))),
        "state, batched": (x[0], also(torch.zeros(1, H))),
        "state, dtype": (x, also(torch.zeros(B, H, dtype=torch.float64))),
        "not a tensor": (x.tolist(),),
        "state, not a tensor": (x, also([0.0] * H)),
        "state, kind": (x, torch.zeros(B, H) if lstm else (torch.zeros(B, H),) * 2),
    }
    if lstm:
        cases["one state"] = (x, (torch.zeros(B, H),))
        cases["three states"] = (x, (torch.zeros(B, H),) * 3)
        cases["cell state, features"] = (x, (torch.zeros(B, H), torch.zeros(B, H + 1)))
    return cases


@kinds
def test_errors(kind):
    stock, ours = pair(kind)
    for name, args in bad_calls(ours).items():
        try:
            stock(*args)
        except Exception as want:
            with pytest.raises(type(want)) as got:
                ours(*args)
            assert str(got.value) == str(want), name
        else:
            # torch.nn lets it pass, which does not oblige us to; silence would be wrong.
            with pytest.raises((RuntimeError, TypeError)):
                ours(*args)


def test_unknown_nonlinearity():
    stock, ours = nn.RNNCell(I, H, nonlinearity="sine"), fnn.RNNCell(I, H, nonlinearity="sine")
    for module in (stock, ours):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sine"):
            module(torch.randn(B, I))


@kinds
def test_one_bias_taken_away(kind):
    stock, ours = pair(kind)
    x, hx = torch.randn(B, I), states(ours, B, H)
    for name in ("bias_hh", "bias_ih"):
        for module in (stock, ours):
            setattr(module, name, None)
        for a, b in zip(flat(ours(x, hx)), flat(stock(x, hx)), strict=True):
            torch.testing.assert_close(a, b)


@kinds
def test_empty_batch_and_no_features(kind):
    stock, ours = pair(kind)
    for a, b in zip(flat(ours(torch.zeros(0, I))), flat(stock(torch.zeros(0, I))), strict=True):
        assert a.shape == b.shape
    name, options = KINDS[kind]
    ours = getattr(fnn, name)(0, H, **options)
    assert flat(ours(torch.zeros(B, 0)))[0].shape == (B, H)


@kinds
def test_frozen_parameters(kind):
    stock, ours = pair(kind)
    hx = states(ours, B, H)
    x = torch.randn(B, I)
    for module in (stock, ours):
        module.eval()
        module.weight_hh.requires_grad_(False)
        flat(module(x, hx))[0].sum().backward()
    assert ours.weight_hh.grad is None
    torch.testing.assert_close(ours.weight_ih.grad, stock.weight_ih.grad)
