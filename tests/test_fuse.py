"""fuse and unfuse: modules of an existing model change class in place and nothing else about them changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fusedseq
import fusedseq.nn as fnn


class Tagger(nn.Module):
    """One of each, one of them reachable twice."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(6, 6, nonlinearity="relu")
        self.lstm = nn.LSTM(6, 3, bidirectional=True)
        self.stack = nn.ModuleList([nn.GRU(6, 6, 2), nn.Linear(6, 6)])
        self.cells = nn.ModuleDict({"a": nn.RNNCell(6, 6), "b": nn.LSTMCell(6, 6), "c": nn.GRUCell(6, 6)})
        self.shared = self.lstm

    def forward(self, x):
        x = self.lstm(self.rnn(x)[0])[0]
        x = self.stack[1](self.stack[0](self.shared(x)[0])[0])
        return self.cells["a"](self.cells["b"](self.cells["c"](x[-1]))[0])


def classes(model):
    return [type(m) for m in model.modules()]


def test_round_trip():
    model = Tagger()
    before, x = classes(model), torch.randn(4, 2, 6)
    parameters = dict(model.named_parameters())
    want = model(x)

    report = fnn.fuse(model)
    assert report.model is model
    assert [(e.name, e.type) for e in report.swapped] == [
        ("rnn", "torch.nn.RNN"),
        ("lstm", "torch.nn.LSTM"),
        ("stack.0", "torch.nn.GRU"),
        ("cells.a", "torch.nn.RNNCell"),
        ("cells.b", "torch.nn.LSTMCell"),
        ("cells.c", "torch.nn.GRUCell"),
    ]
    assert report.skipped == []
    assert "6 swapped, 0 skipped" in repr(report)
    assert "stack.0: torch.nn.GRU swapped" in repr(report)
    assert model.shared is model.lstm
    assert type(model.rnn) is fnn.RNN
    assert all(parameters[n] is p for n, p in model.named_parameters())
    torch.testing.assert_close(model(x), want)

    again = fnn.fuse(model)
    assert again.swapped == again.skipped == []
    assert len(again.unchanged) == 6

    assert len(fnn.unfuse(model).swapped) == 6
    assert classes(model) == before
    assert len(model.lstm._flat_weights) == 8
    torch.testing.assert_close(model(x), want)
    assert fnn.unfuse(model).swapped == []


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_root(name):
    module = getattr(nn, name)(3, 4)
    report = fnn.fuse(module)
    assert report.model is module
    assert type(module) is getattr(fnn, name)
    assert f"(root): torch.nn.{name} swapped" in repr(report)


def test_an_optimizer_goes_on():
    models = [Tagger() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in models]
    for step in range(4):
        if step == 1:
            fnn.fuse(models[1])
        if step == 3:
            fnn.unfuse(models[1])
        x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_belongs_to_the_instance_stays():
    module = nn.LSTM(3, 4, 2, dropout=0.5).eval()
    module.register_buffer("count", torch.ones(1))
    module.note = "mine"
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    module.weight_hh_l0.requires_grad_(False)
    keys = list(module.state_dict())
    fnn.fuse(module)
    module(torch.randn(2, 1, 3))
    assert seen == [fnn.LSTM]
    handle.remove()
    assert (module.training, module.note, module.dropout) == (False, "mine", 0.5)
    assert list(module.state_dict()) == keys
    assert not module.weight_hh_l0.requires_grad
    copy.deepcopy(module).train()(torch.randn(2, 1, 3))


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_parametrized_modules(name):
    module = getattr(nn, name)(3, 4)
    weight = "weight_hh_l0" if name == "GRU" else "weight_hh"
    parametrizations.weight_norm(module, weight)
    parametrizations.orthogonal(module, weight.replace("hh", "ih"))
    x = torch.randn(5, 2, 3) if name == "GRU" else torch.randn(2, 3)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    want = first(module(x))
    assert [e.type for e in fnn.fuse(module).swapped] == [f"torch.nn.{name}"]
    assert isinstance(module, getattr(fnn, name))
    assert parametrize.is_parametrized(module, weight)
    torch.testing.assert_close(first(module(x)), want)
    copied = copy.deepcopy(module)
    torch.testing.assert_close(first(copied(x)), want)
    fnn.unfuse(module)
    assert not isinstance(module, getattr(fnn, name))
    torch.testing.assert_close(first(module(x)), want)
    fnn.fuse(module)
    for tensor in (weight, weight.replace("hh", "ih")):
        parametrize.remove_parametrizations(module, tensor)
    assert type(module) is getattr(fnn, name)
    torch.testing.assert_close(first(module(x)), want)


class MyLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class MyFusedLSTM(fnn.LSTM):
    pass


class Holder(nn.GRU):
    """A subclass that holds a module of its own."""

    def __init__(self):
        super().__init__(3, 4)
        self.inner = nn.GRU(3, 4)


def reasons(report):
    return {e.name: e.reason for e in report.skipped}


def test_subclasses_are_left():
    model = nn.ModuleDict({"mine": MyLSTM(3, 4), "ours": MyFusedLSTM(3, 4), "holder": Holder()})
    report = fnn.fuse(model)
    assert [e.name for e in report.swapped] == ["holder.inner"]
    assert set(reasons(report)) == {"mine", "holder"}
    assert reasons(report)["mine"].startswith("MyLSTM is a subclass of torch.nn.LSTM")
    assert next(e.type for e in report.skipped).endswith("MyLSTM")
    assert "mine" in repr(report)
    assert type(model["mine"]) is MyLSTM
    assert reasons(fnn.unfuse(model)).keys() == {"ours"}


def test_replaced_forward_is_left():
    module = nn.GRU(3, 4)
    module.forward = lambda input, hx=None: "mine"
    assert "forward was replaced" in reasons(fnn.fuse(module))[""]
    assert module(torch.randn(2, 1, 3)) == "mine"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_modules_are_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x):
            return self.rnn(x)[0]

    outer = nn.Sequential(torch.jit.script(Model()), nn.Linear(4, 3))
    assert "TorchScript" in reasons(fnn.fuse(outer))["0.rnn"]
    outer(torch.randn(2, 1, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_modules_are_left():
    from torch.ao.quantization import quantize_dynamic

    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantized engine")
    model = quantize_dynamic(nn.ModuleDict({"lstm": nn.LSTM(3, 4), "cell": nn.GRUCell(3, 4)}))
    before = classes(model)
    report = fnn.fuse(model)
    assert report.swapped == []
    assert all("quantized" in reason for reason in reasons(report).values())
    assert reasons(report).keys() == {"lstm", "cell"}
    assert classes(model) == before


def test_modules_under_fsdp_are_left():
    # A process group is more than this test needs: the wrapper is known by the name of its class.
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = nn.Sequential(FullyShardedDataParallel(nn.Sequential(nn.LSTM(3, 4), MyLSTM(3, 4))), nn.GRU(3, 4))
    report = fnn.fuse(model)
    assert [e.name for e in report.swapped] == ["1"]
    assert all("FSDP" in reason for reason in reasons(report).values())
    assert reasons(report).keys() == {"0.module.0", "0.module.1"}


@pytest.mark.parametrize(
    ("module", "option"),
    [
        (fnn.LSTM(3, 4, return_cells=True), "return_cells=True"),
        (fnn.GRU(3, 4, reset_after=False), "reset_after=False"),
        (fnn.GRUCell(3, 4, reset_after=False), "reset_after=False"),
    ],
)
def test_unfuse_leaves_what_torch_lacks(module, option):
    report = fnn.unfuse(nn.Sequential(module))
    assert report.swapped == []
    assert option in reasons(report)["0"]


def test_not_a_module():
    with pytest.raises(TypeError, match=r"fuse expects a torch\.nn\.Module, got dict"):
        fnn.fuse({})
    with pytest.raises(TypeError, match="unfuse expects"):
        fnn.unfuse(None)


def test_originals_are_those_of_the_import(monkeypatch):
    stock = nn.LSTM(3, 4)
    monkeypatch.setattr(nn, "LSTM", fnn.LSTM)
    monkeypatch.setattr(nn.modules.rnn, "LSTM", fnn.LSTM)
    assert len(fnn.fuse(nn.Sequential(stock)).swapped) == 1
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        nn.LSTM(3, 4)(torch.randn(2, 1, 5))
    assert len(fnn.unfuse(stock).swapped) == 1
    assert type(stock) is not fnn.LSTM


TRANSFORMER = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
KINDS = [
    "MultiheadAttention", "Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder",
    "TransformerEncoderLayer",
]  # fmt: skip


class Classifier(nn.Module):
    """Modules of torch.nn with an attention among them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(6, 8), nn.GRU(8, 8, batch_first=True))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x, padding):
        x = self.embed(x)[0]
        y, weights = self.attention(x, x, x, key_padding_mask=padding)
        return self.head(x + y).mean(1), weights


def test_round_trip_of_a_transformer():
    model = nn.Transformer(8, 2, 2, 2, 16, **TRANSFORMER)
    before = classes(model)
    parameters = dict(model.named_parameters())
    src, tgt = torch.randn(3, 7, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    given = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "src_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4], [5]]),
    }
    want = model(src, tgt, **given)
    report = fnn.fuse(model)
    assert report.skipped == []
    swapped = [e.type for e in report.swapped]
    counts = {kind: swapped.count(f"torch.nn.{kind}") for kind in KINDS}
    assert list(counts.values()) == [6, 1, 1, 2, 1, 2]
    assert sum(counts.values()) == len(swapped)
    assert ("decoder.layers.1.multihead_attn", "torch.nn.MultiheadAttention") in [r[:2] for r in report.swapped]
    assert [type(m) for m in model.modules()] == [type(m) for m in fnn.Transformer(8, 2, 2, 2, 16).modules()]
    assert all(parameters[n] is p for n, p in model.named_parameters())
    torch.testing.assert_close(model(src, tgt, **given), want, rtol=1e-12, atol=1e-12)
    assert len(fnn.fuse(model).unchanged) == len(swapped)
    assert len(fnn.unfuse(model).swapped) == len(swapped)
    assert classes(model) == before
    assert model.encoder.use_nested_tensor
    torch.testing.assert_close(model(src, tgt, **given), want, rtol=0, atol=0)
    with torch.no_grad():
        inside = ~given["src_key_padding_mask"]
        nested = model.encoder.eval()(src, None, given["src_key_padding_mask"])
        fnn.fuse(model)
        torch.testing.assert_close(model.encoder(src, None, given["src_key_padding_mask"])[inside], nested[inside])


def test_an_attention_inside_a_model():
    models = [Classifier() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    padding = torch.arange(5) >= torch.tensor([[5], [2], [4]])
    for step in range(4):
        if step == 1:
            report = fnn.fuse(models[1])
            assert [e.name for e in report.swapped] == ["embed.1", "attention"]
            assert type(models[1].attention) is fnn.MultiheadAttention
        if step == 3:
            assert len(fnn.unfuse(models[1]).swapped) == 2
        x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(step))
        outs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            outs.append(model(x, padding))
            outs[-1][0].square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-6)


class MyLayer(nn.TransformerEncoderLayer):
    """A subclass of a layer, with an attention that is not one."""


def test_parts_of_a_subclass_are_swapped():
    model = nn.TransformerEncoder(MyLayer(8, 2, 16, **TRANSFORMER), 2)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    want = model(x)
    report = fnn.fuse(model)
    assert reasons(report).keys() == {"layers.0", "layers.1"}
    assert reasons(report)["layers.0"].startswith("MyLayer is a subclass of torch.nn.TransformerEncoderLayer")
    assert [e.name for e in report.swapped] == ["", "layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantizable_attention_is_left():
    from torch.ao.nn.quantizable import MultiheadAttention

    report = fnn.fuse(nn.Sequential(MultiheadAttention(8, 2)))
    assert report.swapped == []
    assert "quantized" in reasons(report)["0"]


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer"])
def test_parametrized_attention(name):
    module = getattr(nn, name)(8, 2, dropout=0.0, dtype=torch.float64)
    attention = module if name == "MultiheadAttention" else module.self_attn
    parametrizations.weight_norm(attention, "in_proj_weight")
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    args = (x, x, x) if name == "MultiheadAttention" else (x,)
    want = module(*args)
    assert fnn.fuse(module).skipped == []
    assert isinstance(attention, fnn.MultiheadAttention)
    torch.testing.assert_close(module(*args), want, rtol=1e-12, atol=1e-12)
    fnn.unfuse(module)
    assert not isinstance(attention, fnn.MultiheadAttention)
    assert parametrize.is_parametrized(attention, "in_proj_weight")
    torch.testing.assert_close(module(*args), want, rtol=1e-12, atol=1e-12)


def test_originals_of_the_transformer_are_those_of_the_import(monkeypatch):
    # Once ours stand in torch's place, torch's own constructors make ours, and nothing may call itself.
    for name in KINDS:
        for namespace in (nn, nn.modules.transformer):
            monkeypatch.setattr(namespace, name, getattr(fnn, name))
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", fusedseq.scaled_dot_product_attention)
    model = nn.Transformer(8, 2, 1, 1, 16, **TRANSFORMER)
    assert type(model.encoder.layers[0].self_attn) is fnn.MultiheadAttention
    src, tgt = torch.randn(3, 7, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    want = model(src, tgt)
    assert len(fnn.unfuse(model).swapped) == 8
    torch.testing.assert_close(model(src, tgt), want, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="the batch number of src and tgt must be equal"):
        fnn.Transformer(8, 2, 1, 1, 16, **TRANSFORMER)(src[1:], tgt)
