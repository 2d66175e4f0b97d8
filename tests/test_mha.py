"""MultiheadAttention against torch.nn's: the same call on both must give the same outcome."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from drop_in import (
    EXACT,
    MASKS,
    MHA_OPTIONS,
    B,
    E,
    H,
    L,
    S,
    by_the_rule,
    masks_for,
    padding,
    pair,
    qkv_for,
    run_both,
    same_error,
    table,
    tensor,
)
from torch import nn

import fusedseq
import fusedseq.nn as fnn
from fusedseq.nn import masks as reading

options = pytest.mark.parametrize("option", MHA_OPTIONS)


FORMS = ("batched", "unbatched")


@options
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [None, "average", "heads"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients(option, mask, weights, form):
    stock, ours = pair("MultiheadAttention", E, H, **MHA_OPTIONS[option])
    given = {"need_weights": weights is not None, "average_attn_weights": weights != "heads", **masks_for(mask, form)}

    def call(module, query, key, value):
        return module(query, key, value, **given)

    for train in (True, False):
        run_both(stock.train(train), ours.train(train), call, **qkv_for(ours, form))


@pytest.mark.parametrize("option", ["plain", "batch_first", "bias_kv"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [True, False])
def test_self_attention(option, mask, weights):
    # The three inputs are one tensor, as are the keys and values of a decoder: the products are then joined.
    stock, ours = pair("MultiheadAttention", E, H, **MHA_OPTIONS[option])
    given = {"need_weights": weights, **masks_for(mask, rows=S)}
    run_both(stock, ours, lambda module, x: module(x, x, x, **given), **qkv_for(ours, same=True))
    memory = qkv_for(ours, same=True)
    given = {"need_weights": weights, **masks_for(mask, rows=L)}
    x = qkv_for(ours)["query"]
    run_both(stock, ours, lambda module, x, memory: module(x, memory, memory, **given), x=x, memory=memory["x"])


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("mask", ["none", "right", "left", "bool", "causal", "bool_right", "bool3d_left"])
@pytest.mark.parametrize("weights", [True, False])
def test_evaluation_without_gradients(heads, mask, weights):
    # Where torch has a fast path of its own. It takes an even number of heads.
    stock, ours = pair("MultiheadAttention", E, heads, batch_first=True)
    given = {"need_weights": weights, **masks_for(mask, rows=S, heads=heads)}
    x = qkv_for(ours, same=True)["x"]
    with torch.no_grad():
        got, want = ours.eval()(x, x, x, **given), stock.eval()(x, x, x, **given)
    torch.testing.assert_close(got[0], want[0], **EXACT)
    assert (got[1] is None) == (want[1] is None)
    if weights:
        torch.testing.assert_close(got[1], want[1], **EXACT)
        torch.testing.assert_close(ours.train()(x, x, x, **given), got, rtol=0, atol=0)


@options
def test_masks_that_are_learned(option):
    stock, ours = pair("MultiheadAttention", E, H, **MHA_OPTIONS[option])
    inputs = qkv_for(ours)
    inputs["attn_mask"] = table("float3d")
    inputs["key_padding_mask"] = padding("right_float")
    for weights in (True, False):
        run_both(stock, ours, lambda module, w=weights, **given: module(need_weights=w, **given), **inputs)


def structure(kpm=None, attn=None, extra=0):
    mask, bias = reading.read_masks(torch.float64, H, kpm, attn, causal=False, extra=extra)
    parts = {} if mask is None else {n: getattr(mask, n) for n in ("causal", "key_lengths", "dense")}
    return {n for n, t in {**parts, "bias": bias}.items() if t is not None}


def test_masks_become_structure():
    right, left = padding("right"), padding("left")
    assert structure(right) == {"key_lengths"}
    assert structure(padding("right_float")) == {"key_lengths"}
    assert structure(left) == {"dense"}
    assert structure(padding("added")) == {"bias"}
    assert structure(torch.zeros(B, S, dtype=torch.bool)) == set()
    assert structure(right, extra=1) == {"dense"}
    assert structure(None, table("causal")) == {"causal"}
    assert structure(None, table("causal_inf")) == {"causal"}
    assert structure(right, table("causal")) == {"causal", "key_lengths"}
    assert structure(None, table("causal"), extra=1) == {"dense"}
    assert structure(padding("right_float"), table("float")) == {"key_lengths", "bias"}
    almost = table("causal")
    almost[1, 3] = False
    assert structure(None, almost) == {"dense"}
    learned = padding("right_float").requires_grad_()
    assert structure(learned) == {"bias"}
    mask, _ = reading.read_masks(torch.float64, H, right, None, causal=False, extra=0)
    assert mask.key_lengths.tolist() == [S, 3, 1, S - 1]
    assert structure(torch.ones(B, S, dtype=torch.bool)) == {"key_lengths"}


def test_hint_is_believed_as_in_torch():
    stock, ours = pair("MultiheadAttention", E, H)
    wrong = table("bool")
    run_both(
        stock, ours, lambda module, **x: module(**x, attn_mask=wrong, is_causal=True, need_weights=False),
        **qkv_for(ours),
    )  # fmt: skip


@options
def test_parameters_names_initialisation_state_dict(option):
    stock, ours = pair("MultiheadAttention", E, H, **MHA_OPTIONS[option])
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
    assert repr(ours) == repr(stock)
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.1)
    ours.load_state_dict(stock.state_dict())
    run_both(stock, ours, lambda module, **x: module(**x), **qkv_for(ours))
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(0.5)
    stock.load_state_dict(ours.state_dict())
    run_both(stock, ours, lambda module, **x: module(**x), **qkv_for(ours))
    torch.manual_seed(5)
    stock._reset_parameters()
    torch.manual_seed(5)
    ours._reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))


def test_signatures():
    for method in ("__init__", "forward"):
        want = inspect.signature(getattr(nn.MultiheadAttention, method)).parameters
        got = inspect.signature(getattr(fnn.MultiheadAttention, method)).parameters
        assert [(p.name, p.default, p.kind) for p in got.values()] == [
            (p.name, p.default, p.kind) for p in want.values()
        ]
    assert fusedseq.MultiheadAttention is fnn.MultiheadAttention


@pytest.mark.parametrize("args", [(0, 1), (8, 0), (8, 3), (8.0, 2), ("8", 2)])
def test_construction_errors(args):
    same_error(nn.MultiheadAttention, fnn.MultiheadAttention, *args)


def bad_calls():
    """What torch.nn refuses in a self-attention of [L, B, E], by what is wrong."""
    x, y = tensor(L, B, E), tensor(S, B, E)
    flag = torch.zeros(B, S, dtype=torch.bool)
    pairs = torch.zeros(L, S, dtype=torch.bool)
    return {
        "1-D query": ((x[0, 0], y, y), {}),
        "4-D query": ((x[None], y, y), {}),
        "unbatched query": ((x[:, 0], y, y), {}),
        "unbatched key": ((x, y[:, 0], y), {}),
        "unbatched value": ((x, y, y[:, 0]), {}),
        "features of query": ((x[..., :-1], y, y), {}),
        "features of key": ((x, y[..., :-1], y), {}),
        "features of both": ((x, y[..., :-1], y[..., :-1]), {}),
        "length of value": ((x, y, y[1:]), {}),
        "batch of key": ((x, y[:, 1:], y[:, 1:]), {}),
        "dtype": ((x.float(), y, y), {}),
        "integers": ((x.long(), y.long(), y.long()), {}),
        "device": ((x.to("meta"), y, y), {}),
        "padding, dimensions": ((x, y, y), {"key_padding_mask": flag[0]}),
        "padding, batch": ((x, y, y), {"key_padding_mask": flag[1:]}),
        "padding, length": ((x, y, y), {"key_padding_mask": flag[:, 1:]}),
        "padding, integers": ((x, y, y), {"key_padding_mask": flag.long()}),
        "padding, unbatched": ((x[:, 0], y[:, 0], y[:, 0]), {"key_padding_mask": flag}),
        "mask, dimensions": ((x, y, y), {"attn_mask": pairs[None, None]}),
        "mask, one dimension": ((x, y, y), {"attn_mask": pairs[0]}),
        "mask, size": ((x, y, y), {"attn_mask": pairs.t()}),
        "mask, 3-D size": ((x, y, y), {"attn_mask": pairs.expand(B, L, S)}),
        "mask, integers": ((x, y, y), {"attn_mask": pairs.long()}),
        "mask, unbatched size": ((x[:, 0], y[:, 0], y[:, 0]), {"attn_mask": pairs.expand(H + 1, L, S)}),
        "mask, dtype": ((x, y, y), {"attn_mask": torch.zeros(L, S)}),
        "no mask with is_causal": ((x, y, y), {"is_causal": True}),
        "not a tensor": ((x.tolist(), y, y), {}),
        "no key": ((x, None, y), {}),
    }


@pytest.mark.parametrize("name", bad_calls())
@pytest.mark.parametrize("weights", [True, False])
def test_call_errors(name, weights):
    args, kwargs = bad_calls()[name]
    if name == "mask, dtype" and not weights:
        kwargs = {"attn_mask": torch.zeros(L, S, dtype=torch.bfloat16)}
    stock, ours = pair("MultiheadAttention", E, H)
    same_error(stock, ours, *args, need_weights=weights, **kwargs)


def test_bad_parameters():
    made = pair("MultiheadAttention", E, H, add_bias_kv=True)
    for module in made:
        module.bias_v = None
    same_error(*made, *qkv_for(made[0]).values())
    made = pair("MultiheadAttention", E, H, dropout=1.5)
    same_error(*made, *qkv_for(made[0]).values())


def test_mismatched_masks_warn():
    made = pair("MultiheadAttention", E, H)
    for module in made:
        with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask"):
            module(**qkv_for(module), key_padding_mask=padding("right"), attn_mask=table("float"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made[1](**qkv_for(made[1]), key_padding_mask=padding("right"), attn_mask=table("bool"))


@pytest.mark.parametrize("weights", [True, False])
def test_rows_that_see_nothing(weights):
    stock, ours = pair("MultiheadAttention", E, H)
    with torch.no_grad():
        ours.out_proj.bias.copy_(tensor(E))
    hidden = padding("right")
    hidden[2] = True
    inputs = {k: t.requires_grad_() for k, t in qkv_for(ours).items()}
    out, probs = ours(**inputs, key_padding_mask=hidden, need_weights=weights)
    torch.testing.assert_close(out[:, 2], ours.out_proj.bias.expand(L, E))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in (*ours.parameters(), *inputs.values()))
    assert inputs["query"].grad[:, 2].eq(0).all()
    if weights:
        assert probs[2].eq(0).all()
        # torch.nn gives NaN here, and NaN for every gradient.
        assert stock(**inputs, key_padding_mask=hidden)[1][2].isnan().all()


@options
@pytest.mark.parametrize("shape", [(0, L, S), (B, 0, S), (B, L, 0)], ids=["B0", "L0", "S0"])
def test_empty(option, shape):
    stock, ours = pair("MultiheadAttention", E, H, **MHA_OPTIONS[option])
    batch, rows, keys = shape

    def of(length, features):
        return tensor(*((batch, length, features) if ours.batch_first else (length, batch, features)))

    args = of(rows, E), of(keys, ours.kdim), of(keys, ours.vdim)
    for weights in (True, False):
        got, want = (module(*args, need_weights=weights) for module in (ours, stock))
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, **EXACT)


def test_dropout():
    _, ours = pair("MultiheadAttention", E, H, dropout=1.0, bias=False)
    x = qkv_for(ours)
    assert ours(**x, need_weights=False)[0].eq(0).all()
    silent, _ = pair("MultiheadAttention", E, H, bias=False)
    want = silent(**x)
    torch.testing.assert_close(ours.eval()(**x), want, **EXACT)
    ours.train().dropout = 0.0
    torch.testing.assert_close(ours(**x), want, **EXACT)
    ours.dropout = 0.5
    for weights in (True, False):
        a, b = (ours(**x, need_weights=weights)[0] for _ in range(2))
        assert not torch.equal(a, b)
        torch.manual_seed(3)
        a = ours(**x, need_weights=weights)[0]
        torch.manual_seed(3)
        assert torch.equal(a, ours(**x, need_weights=weights)[0])
    # Every pair is dropped about half of the time, and the others doubled: the mean is that without dropout.
    many = {k: t[:, :1].expand(-1, 4000, -1) for k, t in x.items()}
    torch.testing.assert_close(ours(**many, need_weights=False)[0].mean(1), want[0][:, 0], rtol=0.0, atol=0.03)


def test_weights_under_dropout_are_those_that_made_the_output():
    # Drawn as torch.nn draws them: under one seed all is equal.
    stock, ours = pair("MultiheadAttention", E, H, dropout=0.4)

    def call(module, **x):
        torch.manual_seed(7)
        return module(**x, average_attn_weights=False)

    probs = run_both(stock, ours, call, **qkv_for(ours))[1]
    assert 0.2 < probs.eq(0).double().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal_hint", "right", "bool3d"])
def test_error_rule(dtype, weights, mask):
    made = pair("MultiheadAttention", 32, 2, batch_first=True)
    given = {"need_weights": weights, **masks_for(mask, heads=2)}
    if given["attn_mask"] is not None and given["attn_mask"].dtype == torch.float64:
        given["attn_mask"] = given["attn_mask"].isinf()
    inputs = {"query": tensor(B, L, 32, seed=1), "key": tensor(B, S, 32, seed=2), "value": tensor(B, S, 32, seed=4)}
    by_the_rule(*made, dtype, lambda module, **x: module(**x, **given), B * S * 32, **inputs)
