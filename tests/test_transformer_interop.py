"""The Transformer's modules under what the rest of torch does to modules, and beside torch's nested tensors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from drop_in import (
    EXACT,
    TRANSFORMERS,
    E,
    arguments_for,
    call_with,
    inputs_for,
    made,
    padding,
    run_both,
    tensor,
)
from torch import nn
from torch.func import functional_call, grad, vmap

import fusedseq.nn as fnn

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
]


names = pytest.mark.parametrize("name", TRANSFORMERS)


def test_padding_stays_where_it_is():
    stock, ours = made("TransformerEncoder", heads=2, batch_first=True)
    hidden = padding("right")
    x = inputs_for("TransformerEncoder", ours)["src"]
    want = stock(x, src_key_padding_mask=hidden)
    with torch.no_grad():
        got = ours.eval()(x, src_key_padding_mask=hidden)
        nested = stock.eval()(x, src_key_padding_mask=hidden)
    assert stock.use_nested_tensor and ours.use_nested_tensor
    torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(got[~hidden], nested[~hidden], **EXACT)
    # What torch.nn says about padding in evaluation is not what it says in training.
    torch.testing.assert_close(nested[hidden], stock.norm.bias.expand(int(hidden.sum()), E), **EXACT)
    assert not torch.allclose(got[hidden], nested[hidden])


def test_nested_tensors_of_a_stack_of_torch():
    # A subclass of torch's stack is not swapped, and hands ragged batches to layers that are.
    class Mine(nn.TransformerEncoder):
        pass

    stock, _ = made("TransformerEncoder", heads=2, batch_first=True)
    mine = Mine(copy.deepcopy(stock.layers[0]), 2, copy.deepcopy(stock.norm))
    assert [e.type for e in fnn.fuse(mine).swapped] == [
        "torch.nn.TransformerEncoderLayer", "torch.nn.MultiheadAttention",
    ] * 2  # fmt: skip
    x = inputs_for("TransformerEncoder", mine)["src"]
    hidden = padding("right")
    with torch.no_grad():
        torch.testing.assert_close(
            mine.eval()(x, src_key_padding_mask=hidden), stock.eval()(x, src_key_padding_mask=hidden), **EXACT
        )
        nested = torch.nested.nested_tensor([tensor(3, E), tensor(5, E)])
        _, ours = made("TransformerEncoder", heads=2, batch_first=True)
        for a, b in zip(ours.eval()(nested).unbind(), stock.eval()(nested).unbind(), strict=True):
            torch.testing.assert_close(a, b, **EXACT)


@names
def test_autocast(name):
    stock, ours = made(name, dtype=torch.float32)
    x = {k: t.float() for k, t in inputs_for(name, ours).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(**x), stock(**x)
    assert got.dtype == want.dtype
    got.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(got.float(), ours(**x), rtol=0.05, atol=0.1)


@names
@pytest.mark.parametrize("masks", [("causal_right", "right"), ("none", "none")], ids="-".join)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_compile_fullgraph(name, masks):
    _, ours = made(name, batch_first=True)
    given = arguments_for(name, *masks)
    given = {k: v for k, v in given.items() if not k.endswith("is_causal")}  # left to be found out
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    run_both(ours, compiled, call_with(given), **inputs_for(name, ours))


@names
def test_export(name):
    _, ours = made(name, batch_first=True)
    x = inputs_for(name, ours)
    exported = torch.export.export(ours.eval(), (), x).module()
    torch.testing.assert_close(exported(**x), ours(**x), **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'norm' was found in ScriptModule constants:UserWarning")
@names
def test_script(name):
    stock, ours = made(name)
    x = tuple(inputs_for(name, ours).values())
    want = torch.jit.script(stock)(*x)
    scripted = torch.jit.script(ours)
    assert scripted.original_name == name
    torch.testing.assert_close(scripted(*x), want, **EXACT)
    torch.testing.assert_close(ours(*x), want, **EXACT)


@names
def test_symbolic_trace_keeps_the_module_whole(name):
    class One(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, a):
            return 2 * self.inner(a)

    class Two(One):
        def forward(self, a, b):
            return 2 * self.inner(a, b)

    modules = made(name, batch_first=True)
    x = tuple(inputs_for(name, modules[0]).values())
    want, got = (torch.fx.symbolic_trace((One if len(x) == 1 else Two)(m)) for m in modules)
    assert [(n.op, n.name) for n in got.graph.nodes] == [(n.op, n.name) for n in want.graph.nodes]
    torch.testing.assert_close(got(*x), want(*x), **EXACT)


@names
def test_copies_and_files(name):
    stock, ours = made(name)
    x = inputs_for(name, ours)
    want = stock(**x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
        torch.testing.assert_close(other(**x), want, **EXACT)
    _, meta = made(name)
    meta = meta.to("meta").to_empty(device="cpu")
    meta.load_state_dict(stock.state_dict())
    torch.testing.assert_close(meta(**x), want, **EXACT)


@names
def test_per_sample_gradients(name):

    stock, ours = made(name, batch_first=True)
    x = inputs_for(name, ours)
    parameters = {k: v.detach() for k, v in ours.named_parameters()}

    def loss(parameters, *sample):
        inputs = {k: t[None] for k, t in zip(x, sample, strict=True)}
        return functional_call(ours, parameters, (), inputs).pow(3).sum()

    got = vmap(grad(loss), (None, *(0,) * len(x)))(parameters, *x.values())
    stock(**{k: t[1:2] for k, t in x.items()}).pow(3).sum().backward()
    for k, v in stock.named_parameters():
        torch.testing.assert_close(got[k][1], v.grad, **EXACT)
