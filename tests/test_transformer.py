"""The Transformer's layers and stacks against torch.nn's: the same call on both must give the same outcome."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from drop_in import (
    EXACT,
    LAYER_OPTIONS,
    TRANSFORMERS,
    B,
    E,
    H,
    S,
    T,
    arguments_for,
    by_the_rule,
    call_with,
    flat,
    inputs_for,
    is_encoder,
    made,
    padding,
    run_both,
    same_error,
)
from torch import nn

import fusedseq
import fusedseq.nn as fnn
from fusedseq.nn import masks as reading

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
]


names = pytest.mark.parametrize("name", TRANSFORMERS)


options = pytest.mark.parametrize("option", LAYER_OPTIONS)


MASK_PAIRS = [
    ("none", "none"), ("right", "bool"), ("bool", "right"), ("causal", "left"), ("causal_right", "right"),
    ("causal_hint", "float3d"), ("float_added", "added_padding"), ("bool3d", "none"), ("float3d_right", "causal_hint"),
]  # fmt: skip


@names
@options
@pytest.mark.parametrize(
    ("form", "masks"),
    [*(("batched", pair) for pair in MASK_PAIRS), *(("unbatched", pair) for pair in MASK_PAIRS[:3])],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_outputs_and_gradients(name, option, form, masks):
    stock, ours = made(name, **LAYER_OPTIONS[option])
    given = arguments_for(name, *masks, form)
    for train in (True, False):
        run_both(stock.train(train), ours.train(train), call_with(given), **inputs_for(name, ours, form))


@names
@pytest.mark.parametrize("option", ["batch_first", "gelu", "module"])
@pytest.mark.parametrize("masks", [("none", "none"), ("causal", "left"), ("bool", "bool")], ids="-".join)
def test_evaluation_without_gradients(name, option, masks):
    # Where torch has a fused layer of its own; it takes an even number of heads.
    stock, ours = made(name, heads=2, **LAYER_OPTIONS[option])
    given = arguments_for(name, *masks, heads=2)
    x = inputs_for(name, ours)
    with torch.no_grad():
        got = ours.eval()(**x, **given)
        torch.testing.assert_close(got, stock.eval()(**x, **given), **EXACT)
    torch.testing.assert_close(ours.train()(**x, **given), got, rtol=0, atol=0)


@names
@options
def test_parameters_names_initialisation_state_dict(name, option):
    stock, ours = made(name, **LAYER_OPTIONS[option])
    assert isinstance(ours, type(stock))
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
    assert repr(ours) == repr(stock)
    x = inputs_for(name, ours)
    for source, target in ((stock, ours), (ours, stock)):
        with torch.no_grad():
            for p in source.parameters():
                p.mul_(0.7).add_(0.01)
        target.load_state_dict(source.state_dict())
        run_both(stock, ours, call_with({}), **x)


@names
def test_what_it_is_made_of(name):
    _, ours = made(name)
    kinds = {type(m) for m in ours.modules() if type(m).__name__ in (*TRANSFORMERS, "MultiheadAttention")}
    assert kinds == {getattr(fnn, kind.__name__) for kind in kinds}
    assert fnn.MultiheadAttention in kinds
    assert getattr(fusedseq, name) is getattr(fnn, name)


@names
def test_signatures(name):
    for method in ("__init__", "forward"):
        want = inspect.signature(getattr(getattr(nn, name), method)).parameters
        got = inspect.signature(getattr(getattr(fnn, name), method)).parameters
        assert [(p.name, p.default, p.kind) for p in got.values()] == [
            (p.name, p.default, p.kind) for p in want.values()
        ]


def test_custom_encoder_and_decoder_stay_what_they_are():
    class Encoder(nn.TransformerEncoder):
        pass

    layer = nn.TransformerEncoderLayer(E, H)
    encoder, decoder = Encoder(layer, 1), nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H), 1)
    model = fnn.Transformer(E, H, custom_encoder=encoder)
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder) is fnn.TransformerDecoder
    model = fnn.Transformer(E, H, 1, 1, 16, 0.1, F.relu, None, decoder)
    assert type(model.encoder.layers[0].self_attn) is fnn.MultiheadAttention
    assert type(model.decoder) is nn.TransformerDecoder
    assert type(model.decoder.layers[0].self_attn) is nn.MultiheadAttention
    assert type(fnn.TransformerEncoder(layer, 1).layers[0]) is nn.TransformerEncoderLayer


def test_warnings_about_nested_tensors():
    for kwargs in ({"norm_first": True, "batch_first": True}, {}, {"batch_first": True, "bias": False}):
        texts = []
        for namespace in (nn, fnn):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                namespace.TransformerEncoder(namespace.TransformerEncoderLayer(E, 2, **kwargs), 1)
            texts.append([str(w.message) for w in caught])
            assert {w.filename for w in caught} == {__file__}
        assert texts[0] == texts[1]
        assert "enable_nested_tensor is True" in texts[0][0]


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n.endswith("Layer")] + ["Transformer"])
@pytest.mark.parametrize(
    "kwargs", [{"activation": "tanh"}, {"nhead": 5}, {"d_model": 0}, {"dropout": 2.0}, {"head": 1}]
)
def test_construction_errors(name, kwargs):
    given = {"d_model": E, "nhead": H, **kwargs}
    same_error(getattr(nn, name), getattr(fnn, name), **given)


def bad_calls(name):
    """By what is wrong: arguments that torch.nn refuses."""
    stock, _ = made(name)
    x = inputs_for(name, stock)
    cases = {}
    for key, t in x.items():
        cases[f"{key}, features"] = {**x, key: t[..., 1:]}
        cases[f"{key}, dimensions"] = {**x, key: t[None]}
        cases[f"{key}, unbatched"] = {**x, key: t[:, 0]} if len(x) > 1 else {**x, key: t[0, 0]}
        cases[f"{key}, dtype"] = {**x, key: t.float()}
        cases[f"{key}, kind"] = {**x, key: t.tolist()}
    given = arguments_for(name, "bool_right", "bool_right")
    for key, t in given.items():
        if isinstance(t, torch.Tensor):
            cases[f"{key}, size"] = {**x, key: t[:, 1:]}
            cases[f"{key}, integers"] = {**x, key: t.long()}
            cases[f"{key}, dimensions"] = {**x, key: t[0]}
    hint = "is_causal" if is_encoder(name) else "memory_is_causal"
    cases["no mask with a hint"] = {**x, hint: True}
    return cases


@names
def test_call_errors(name):
    stock, ours = made(name)
    for what, kwargs in bad_calls(name).items():
        try:
            same_error(stock, ours, **kwargs)
        except BaseException as e:
            e.add_note(f"with bad {what}") if hasattr(e, "add_note") else None
            raise


@names
@pytest.mark.parametrize("shape", ["batch", "sequence"])
def test_empty(name, shape):
    stock, ours = made(name, batch_first=True)
    x = inputs_for(name, ours, batch=0 if shape == "batch" else B)
    if shape == "sequence":
        x = {k: t[:, :0] for k, t in x.items()}
    run_both(stock, ours, call_with({}), **x)


class OwnBlocks:
    """What a user's subclass may change."""

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        bias = attn_mask + key_padding_mask[:, None]  # floating, as torch.nn hands them on
        return torch.softmax(x @ x.transpose(1, 2) + bias, -1) @ x

    def _ff_block(self, x):
        return 0.5 * x


def test_overridden_blocks():
    class Stock(OwnBlocks, nn.TransformerEncoderLayer):
        pass

    class Ours(OwnBlocks, fnn.TransformerEncoderLayer):
        pass

    layers = [cls(E, H, 17, 0.0, batch_first=True, dtype=torch.float64) for cls in (Stock, Ours)]
    layers[1].load_state_dict(layers[0].state_dict())
    for stack in (False, True):
        modules = [nn.TransformerEncoder(layers[0], 2), fnn.TransformerEncoder(layers[1], 2)] if stack else layers
        given = arguments_for("TransformerEncoder" if stack else "TransformerEncoderLayer", "bool_right")
        run_both(*modules, call_with(given), **inputs_for("TransformerEncoderLayer", modules[1]))
        want, got = modules
        x = inputs_for("TransformerEncoderLayer", got)
        torch.testing.assert_close(got.eval()(**x, **given), want.train()(**x, **given), **EXACT)


class OwnAttention(nn.Module):
    """In place of self_attn: called by keyword as torch.nn calls it, and with its masks."""

    batch_first = True

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(E, E, dtype=torch.float64)
        self.seen = []

    def forward(self, q, k, v, attn_mask=None, key_padding_mask=None, need_weights=True, is_causal=False):
        self.seen.append([m if m is None else (m.dtype, m.shape) for m in (attn_mask, key_padding_mask)])
        return self.proj(q), None


def test_replaced_attention():
    modules = made("TransformerEncoder", batch_first=True)
    torch.manual_seed(2)
    mine = OwnAttention()
    for module in modules:
        for layer in module.layers:
            layer.self_attn = copy.deepcopy(mine)
    given = arguments_for("TransformerEncoder", "bool_right")
    run_both(*modules, call_with(given), **inputs_for("TransformerEncoder", modules[1]))
    assert modules[0].layers[1].self_attn.seen == modules[1].layers[1].self_attn.seen


def test_hooks_hold_in_evaluation():
    _, ours = made("TransformerEncoderLayer", heads=2, batch_first=True)
    seen = []
    ours.linear1.register_forward_hook(lambda *args: seen.append("linear1"))
    ours.self_attn.register_forward_hook(lambda *args: seen.append("self_attn"))
    with torch.no_grad():
        ours.eval()(**inputs_for("TransformerEncoderLayer", ours))
    assert seen == ["self_attn", "linear1"]


def test_causal_masks_are_found_once():
    size = torch.ones(S, S, dtype=torch.bool).triu(1)
    _, ours = made("TransformerEncoder")
    calls = []
    for layer in ours.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append(kwargs["is_causal"]), with_kwargs=True
        )
    x = inputs_for("TransformerEncoder", ours)["src"]
    for mask, want in ((size, True), (~size, False), (size.t(), False), (None, False)):
        calls.clear()
        ours(x, mask)
        assert calls == [want, want]
    assert reading.is_causal(nn.Transformer.generate_square_subsequent_mask(S))


@names
def test_dropout(name):
    stock, ours = made(name, dropout=0.5)
    x = inputs_for(name, ours)
    silent, _ = made(name)
    want = silent(**x)
    torch.testing.assert_close(ours.eval()(**x), want, **EXACT)
    ours.train()
    assert not torch.equal(ours(**x), ours(**x))
    torch.manual_seed(3)
    first = ours(**x)
    torch.manual_seed(3)
    assert torch.equal(ours(**x), first)
    for module in (stock, ours):
        for part in module.modules():
            if isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0
    # Dropouts that somebody watches are called as modules, and are torch's own.
    for part in ours.modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(lambda *args: None)
    torch.manual_seed(4)
    want = stock.train()(**x)
    torch.manual_seed(4)
    torch.testing.assert_close(ours(**x), want, **EXACT)
    for part in ours.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    torch.testing.assert_close(ours(**x), silent(**x), **EXACT)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_rule(name, dtype):
    modules = made(name, heads=2, features=32, batch_first=True)
    given = arguments_for(name, "causal_right", "right", heads=2)
    by_the_rule(*modules, dtype, call_with(given), B * S * 32, **inputs_for(name, modules[1], features=32))


@names
def test_rows_that_see_nothing(name):
    _, ours = made(name, batch_first=True)
    hidden = padding("right")
    hidden[2] = True
    keys = ["src_key_padding_mask"] if is_encoder(name) else ["memory_key_padding_mask"]
    if name == "Transformer":
        keys.append("src_key_padding_mask")
    given = dict.fromkeys(keys, hidden)
    out = ours(**inputs_for(name, ours), **given)
    out.square().sum().backward()
    assert all(t.isfinite().all() for t in flat(out))
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_masks_of_a_decoder_in_training_are_structure(monkeypatch):
    # The usual call: causal mask, right-padded source and target. No table of scores is made for it.
    given = []
    attend = fusedseq.ops.attention
    monkeypatch.setattr(fusedseq.ops, "attention", lambda *a, **k: given.append(k["mask"]) or attend(*a, **k))
    _, ours = made("Transformer", batch_first=True)
    hidden = padding("right")
    x = inputs_for("Transformer", ours)
    ours(
        **x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64),
        src_key_padding_mask=hidden, tgt_key_padding_mask=hidden[:, :T], memory_key_padding_mask=hidden,
    )  # fmt: skip
    assert [(m.causal, m.dense, m.key_lengths is None) for m in given] == (
        [(None, None, False)] * 2 + [("top-left", None, False), (None, None, False)] * 2
    )
