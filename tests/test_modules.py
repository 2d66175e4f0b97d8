"""RNN, LSTM and GRU against their torch.nn namesakes: the same call on both must give the same outcome."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedseq.nn as fnn

I, H, B, T = 3, 5, 4, 6

KINDS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
SHAPES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "deep_both": {"num_layers": 2, "bidirectional": True},
    "nobias": {"bias": False, "num_layers": 2, "batch_first": True},
    "float64": {"dtype": torch.float64, "bidirectional": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def pair(kind, **kwargs):
    """torch's module and ours, under the same seed."""
    name, options = KINDS[kind]
    made = []
    for namespace in (nn, fnn):
        torch.manual_seed(0)
        made.append(getattr(namespace, name)(I, H, **options, **kwargs))
    return made


def state_for(module, batch=B, seed=1, batched=True, dtype=None):
    """A random hx, leaf tensors, in the form that the module takes."""
    generator = torch.Generator().manual_seed(seed)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    dtype = dtype or next(module.parameters()).dtype

    def one(size):
        shape = (rows, batch, size) if batched else (rows, size)
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    h = one(module.proj_size or module.hidden_size)
    return (h, one(module.hidden_size)) if isinstance(module, nn.LSTM) else h


def input_for(module, batch=B, steps=T, batched=True, seed=2):
    generator = torch.Generator().manual_seed(seed)
    shape = ((batch, steps, I) if module.batch_first else (steps, batch, I)) if batched else (steps, I)
    return torch.randn(shape, generator=generator, dtype=next(module.parameters()).dtype).requires_grad_()


def flat(result):
    """All tensors of a forward's result, in order."""
    if isinstance(result, PackedSequence):
        return [t for t in result if t is not None]
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def leaves(hx):
    return [] if hx is None else list(hx) if isinstance(hx, tuple) else [hx]


def run_both(stock, ours, call):
    """Outputs and gradients of `call(module) -> (result, leaf tensors)`, compared; returns our result."""
    outcomes = []
    for module in (stock, ours):
        module.zero_grad()
        result, wrt = call(module)
        tensors = [t for t in flat(result) if t.dtype.is_floating_point]
        generator = torch.Generator().manual_seed(3)
        loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors)
        wrt = [*wrt, *(p for p in module.parameters() if p.requires_grad)]
        outcomes.append((result, flat(result), torch.autograd.grad(loss, wrt, allow_unused=True)))
    (want, wants, want_grads), (got, gots, got_grads) = outcomes
    assert type(got) is type(want)
    assert type(got[0]) is type(want[0])
    for a, b in zip(gots, wants, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return got


def same_error(stock, ours, *args):
    with pytest.raises(Exception) as want:
        stock(*args)
    with pytest.raises(type(want.value)) as got:
        ours(*args)
    assert type(got.value) is type(want.value)
    assert str(got.value) == str(want.value)


@kinds
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
def test_outputs_and_gradients(kind, shape, batched, given):
    stock, ours = pair(kind, **SHAPES[shape])

    def call(module):
        x = input_for(module, batched=batched)
        hx = state_for(module, batched=batched) if given else None
        return module(x, hx), [x, *leaves(hx)]

    run_both(stock, ours, call)


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}]
)
def test_projection(options):
    stock, ours = pair("lstm", proj_size=2, **options)

    def call(module):
        x, hx = input_for(module), state_for(module)
        return module(x, hx), [x, *hx]

    run_both(stock, ours, call)


@kinds
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
def test_packed(kind, enforce_sorted, given):
    stock, ours = pair(kind, num_layers=2, bidirectional=True)
    lengths = torch.tensor([6, 4, 4, 1] if enforce_sorted else [4, 6, 1, 4])

    def call(module):
        x = input_for(module)
        hx = state_for(module) if given else None
        packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        return module(packed, hx), [x, *leaves(hx)]

    out = run_both(stock, ours, call)[0]
    assert isinstance(out, PackedSequence)
    torch.testing.assert_close(pad_packed_sequence(out)[1], lengths)


@kinds
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_parameters_names_initialisation_state_dict(kind, options):
    stock, ours = pair(kind, **options)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
    assert list(ours.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(1)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(stock)
    assert isinstance(ours, type(stock))
    torch.manual_seed(5)
    stock.reset_parameters()
    torch.manual_seed(5)
    ours.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.all_weights[0], stock.all_weights[0], strict=True))


BAD_CONSTRUCTIONS = [
    ((I,), {}),
    ((0, H), {}),
    ((I, 0), {}),
    ((2.5, H), {}),
    ((I, H), {"hidden": 3}),
    ((I, H), {"num_layers": 0}),
    ((I, H), {"bias": 1}),
    ((I, H), {"batch_first": 0}),
    ((I, H), {"dropout": 1.5}),
    ((I, H), {"dropout": True}),
    ((I, H), {"proj_size": 2}),
    ((I, H), {"proj_size": H}),
    ((I, H), {"proj_size": -1}),
    ((I, H), {"nonlinearity": "sine"}),
]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(("args", "kwargs"), BAD_CONSTRUCTIONS)
def test_construction_errors(name, args, kwargs):
    try:
        getattr(nn, name)(*args, **kwargs)
    except Exception as want:
        with pytest.raises(type(want)) as got:
            getattr(fnn, name)(*args, **kwargs)
        assert str(got.value) == str(want)
    else:
        getattr(fnn, name)(*args, **kwargs)


def test_positional_arguments_and_warning():
    ours = fnn.RNN(I, H, 2, "relu", False, True, 0.25, True)
    assert repr(ours) == repr(nn.RNN(I, H, 2, "relu", False, True, 0.25, True))
    assert ours.mode == "RNN_RELU"
    ours = fnn.LSTM(I, H, 2, True, False, 0.5, True, 2, "cpu", torch.float64)
    assert ours.weight_hr_l1_reverse.shape == (2, H)
    assert ours.weight_hr_l1_reverse.dtype == torch.float64
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        fnn.GRU(I, H, dropout=0.5)
    meta = fnn.GRU(I, H, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    meta(torch.randn(T, B, I))


def bad_calls(module):
    """Arguments that torch.nn refuses, by what is wrong with them."""
    x, hx = input_for(module).detach(), state_for(module)
    lstm = isinstance(module, nn.LSTM)

    def also(h, c=None):
        return (h, h if c is None else c) if lstm else h

    rows = module.num_layers * (2 if module.bidirectional else 1)
    packed = pack_padded_sequence(x, torch.full((B,), T), batch_first=module.batch_first)
    cases = {
        "1-D input": (x[0, 0],),
        "4-D input": (x[None],),
        "features": (torch.randn(T, B, I + 1),),
        "features, unbatched": (torch.randn(T, I + 1),),
        "dtype of input": (x.double(),),
        "no steps": (torch.randn(0, B, I) if not module.batch_first else torch.randn(B, 0, I),),
        "state, dimensions": (x, also(torch.zeros(rows, H))),
        "state, unbatched input": (x[:, 0], also(torch.zeros(rows, B, H))),
        "state, batch": (x, also(torch.zeros(rows, B + 1, H))),
        "state, layers": (x, also(torch.zeros(rows + 1, B, H))),
        "state, too many layers": (x, also(torch.zeros(2 * rows, B, H))),
        "state, features": (x, also(torch.zeros(rows, B, H + 1))),
        "state, dtype": (x, also(torch.zeros(rows, B, H, dtype=torch.float64))),
        "state, device": (x, also(torch.zeros(rows, B, H, device="meta"))),
        "input, device": (x.to("meta"),),
        "state, kind": (x, state_for(module)[0] if lstm else (hx, hx)),
        "packed, state batch": (packed, also(torch.zeros(rows, B + 1, H))),
        "packed, state layers": (packed, also(torch.zeros(rows + 1, B, H))),
        "packed, features": (PackedSequence(torch.randn(packed.data.shape[0], I + 1), packed.batch_sizes),),
        "packed, dimensions": (PackedSequence(packed.data[None], packed.batch_sizes),),
        "not a tensor": (x.tolist(),),
        "none": (None,),
    }
    if lstm:
        cases["cell state, features"] = (x, (torch.zeros(rows, B, H), torch.zeros(rows, B, H + 1)))
        cases["one state"] = (x, (torch.zeros(rows, B, H),))
        cases["three states"] = (x, (torch.zeros(rows, B, H),) * 3)
        cases["no cell state"] = (x, (torch.zeros(rows, B, H), None))
        # torch.nn.LSTM does not check packed input; see test_packed_input_is_checked.
        cases = {name: args for name, args in cases.items() if not name.startswith("packed")}
    return cases


@kinds
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_call_errors(kind, options):
    stock, ours = pair(kind, **options)
    for name, args in bad_calls(ours).items():
        try:
            same_error(stock, ours, *args)
        except BaseException as e:
            e.add_note(f"with bad {name}") if hasattr(e, "add_note") else None
            raise


@pytest.mark.parametrize("num_layers", [1, 2])
def test_packed_input_is_checked(num_layers):
    _, ours = pair("lstm", num_layers=num_layers)
    packed = pack_padded_sequence(input_for(ours), torch.full((B,), T))
    for shape in ((num_layers, B + 1, H), (num_layers + 1, B, H), (num_layers, B, H + 1), (num_layers, B - 1, H)):
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
            ours(packed, (torch.zeros(shape), torch.zeros(shape)))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        ours(PackedSequence(torch.randn(packed.data.shape[0], I + 1), packed.batch_sizes))
    with pytest.raises(RuntimeError, match="must have 2 dimensions"):
        ours(PackedSequence(packed.data[None], packed.batch_sizes))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        ours(PackedSequence(packed.data.double(), packed.batch_sizes))


@kinds
def test_empty_batch(kind):
    stock, ours = pair(kind, num_layers=2)
    x = torch.zeros(T, 0, I)
    for a, b in zip(flat(ours(x)), flat(stock(x)), strict=True):
        assert a.shape == b.shape


@kinds
def test_dropout(kind):
    stock, ours = pair(kind, num_layers=2, dropout=1.0)
    x = input_for(ours)
    # The second layer sees zeros, not NaN, whatever the first one computes.
    for a, b in zip(flat(ours(x)), flat(stock(x)), strict=True):
        torch.testing.assert_close(a, b)
    silent, _ = pair(kind, num_layers=2)
    for module in (ours.eval(), stock.eval()):
        torch.testing.assert_close(module(x)[0], silent(x)[0])
    ours.train()
    ours.dropout = 0.0
    torch.testing.assert_close(ours(x)[0], silent(x)[0])
    ours.dropout = 0.5
    assert not torch.equal(ours(x)[0], ours(x)[0])
    for module in (stock, ours):
        module.train().dropout = 2.0
    same_error(stock, ours, x)


@kinds
def test_dropout_is_that_of_torch_under_one_seed(kind):
    stock, ours = pair(kind, num_layers=3, dropout=0.4)
    x = input_for(ours)
    torch.manual_seed(7)
    want = stock(x)[0]
    torch.manual_seed(7)
    torch.testing.assert_close(ours(x)[0], want)


@kinds
def test_frozen_parameters_and_eval_backward(kind):
    stock, ours = pair(kind, bidirectional=True)
    for module in (stock, ours):
        module.eval()
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l0_reverse.requires_grad_(False)

    def call(module):
        x = input_for(module)
        return module(x), [x]

    run_both(stock, ours, call)
    ours(input_for(ours))[0].sum().backward()
    assert ours.weight_hh_l0.grad is None
    assert ours.weight_ih_l0.grad is not None


@kinds
def test_strided_and_expanded_gradients(kind):
    stock, ours = pair(kind, batch_first=True)

    def call(module):
        x = input_for(module, batch=2 * B)
        y, state = module(x[::2])
        return (y.transpose(0, 1)[::2].expand(2, -1, -1, -1), state), [x]

    run_both(stock, ours, call)


@kinds
def test_retain_graph_and_second_backward(kind):
    _, ours = pair(kind)
    y = ours(input_for(ours))[0].sum()
    y.backward(retain_graph=True)
    first = ours.weight_ih_l0.grad.clone()
    y.backward()
    torch.testing.assert_close(ours.weight_ih_l0.grad, 2 * first)


@kinds
def test_weights_are_read_where_they_are(kind):
    stock, ours = pair(kind)
    x = input_for(ours)

    def agree():
        torch.testing.assert_close(ours(x)[0], stock(x)[0])
        want = [id(getattr(ours, name)) for name, _ in pair(kind)[1].named_parameters()]
        assert [id(w) for w in ours._flat_weights] == want
        assert [id(w) for group in ours.all_weights for w in group] == want

    for module in (stock, ours):
        module.flatten_parameters()
        module.weight_hh_l0 = nn.Parameter(torch.full_like(module.weight_hh_l0, 0.1))
    agree()
    for module in (stock, ours):
        del module.weight_hh_l0
        module.weight_hh_l0 = nn.Parameter(torch.full_like(module.weight_ih_l0[:, :1].expand(-1, H), -0.1))
    agree()
    _, other = pair(kind)
    for module in (stock, ours):
        module.load_state_dict({k: v + 1 for k, v in other.state_dict().items()}, assign=True)
    agree()
    for module in (stock, ours):
        module.double()
    x = x.double()
    agree()


@kinds
def test_copies(kind):
    stock, ours = pair(kind, num_layers=2, bidirectional=True)
    x = input_for(ours)
    want = ours(x)[0]
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert torch.equal(other(x)[0], want)
        assert len(other._flat_weights) == len(stock._flat_weights)
        other.to(torch.float64)(x.double())


def test_state_of_older_versions_is_understood():
    _, ours = pair("lstm", bidirectional=True)
    x = input_for(ours)
    state = ours.__getstate__()
    state.pop("proj_size")
    names = [n for n, _ in ours.named_parameters()]
    state["all_weights"] = [[ours._parameters[n] for n in names[:4]], [ours._parameters[n] for n in names[4:]]]
    state.pop("_all_weights")
    state.pop("_flat_weights_names")
    old = fnn.LSTM.__new__(fnn.LSTM)
    old.__setstate__(state)
    assert old._flat_weights_names == names
    assert torch.equal(old(x)[0], ours(x)[0])
    assert repr(old) == repr(ours)


@kinds
def test_hooks(kind):
    _, ours = pair(kind)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    ours.register_forward_hook(lambda module, args, output: seen.append("post"))
    ours.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("back"))
    ours(input_for(ours))[0].sum().backward()
    assert seen == ["pre", "post", "back"]


def test_documented():
    for cls in (fnn.RNN, fnn.LSTM, fnn.GRU, fnn.RNNCell, fnn.LSTMCell, fnn.GRUCell):
        text = inspect.getdoc(cls)
        assert "Args:" in text
        assert "Raises:" in text
