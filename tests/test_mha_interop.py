"""MultiheadAttention under what the rest of torch does to modules: compiling, scripting, mapping, copying."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from drop_in import (
    EXACT,
    MHA_OPTIONS,
    B,
    E,
    H,
    padding,
    pair,
    qkv_for,
    run_both,
    same_error,
    table,
    tensor,
)
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations

import fusedseq.nn as fnn

options = pytest.mark.parametrize("option", MHA_OPTIONS)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("option", ["plain", "both_extra", "vdim_extra"])
def test_autocast(option, weights):
    stock, ours = pair("MultiheadAttention", E, H, dtype=torch.float32, **MHA_OPTIONS[option])
    x = qkv_for(ours, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(**x, need_weights=weights), stock(**x, need_weights=weights)
    assert [t.dtype for t in got if t is not None] == [t.dtype for t in want if t is not None]
    got[0].float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(got[0].float(), ours(**x)[0], rtol=0.05, atol=0.02)


@options
@pytest.mark.parametrize("weights", [True, False])
def test_compile_fullgraph(option, weights):
    _, ours = pair("MultiheadAttention", E, H, **MHA_OPTIONS[option])
    x = {k: t.requires_grad_() for k, t in qkv_for(ours).items()}
    given = {"need_weights": weights, "key_padding_mask": padding("right"), "attn_mask": table("causal")}
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    run_both(ours, compiled, lambda module, **x: module(**x, **given), **x)


def test_export():
    _, ours = pair("MultiheadAttention", E, H, batch_first=True)
    args = tuple(qkv_for(ours).values())
    given = {"key_padding_mask": padding("right"), "need_weights": False}
    exported = torch.export.export(ours.eval(), args, given).module()
    torch.testing.assert_close(exported(*args, **given), ours(*args, **given), **EXACT)
    given["key_padding_mask"] = padding("left")
    torch.testing.assert_close(exported(*args, **given), ours(*args, **given), **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_script_and_trace():
    stock, ours = pair("MultiheadAttention", E, H)
    x = tuple(qkv_for(ours).values())
    scripted = torch.jit.script(ours)
    assert scripted.original_name == "MultiheadAttention"
    torch.testing.assert_close(scripted(*x), stock(*x), **EXACT)
    traced = torch.jit.trace(ours, x)
    torch.testing.assert_close(traced(*(2 * t for t in x)), stock(*(2 * t for t in x)), **EXACT)

    class Mine(fnn.MultiheadAttention):
        pass

    with pytest.raises(RuntimeError, match=r"subclass of fusedseq\.MultiheadAttention"):
        torch.jit.script(Mine(E, H))


def test_copies_and_files():
    stock, ours = pair("MultiheadAttention", E, H, add_bias_kv=True)
    x = qkv_for(ours)
    want = stock(**x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(other) is fnn.MultiheadAttention
        torch.testing.assert_close(other(**x), want, **EXACT)
    meta = fnn.MultiheadAttention(E, H, device="meta", dtype=torch.float64).to_empty(device="cpu")
    meta.load_state_dict(pair("MultiheadAttention", E, H)[0].state_dict())
    torch.testing.assert_close(meta(**x), pair("MultiheadAttention", E, H)[0](**x), **EXACT)
    old = dict(ours.__dict__)
    del old["_qkv_same_embed_dim"]
    revived = fnn.MultiheadAttention.__new__(fnn.MultiheadAttention)
    revived.__setstate__(old)
    torch.testing.assert_close(revived(**x), want, **EXACT)


class Labelled(torch.Tensor):
    """A tensor subclass with the default torch function: whatever it takes part in becomes one of its kind."""


def test_parameters_of_a_subclass():
    made = pair("MultiheadAttention", E, H)
    for module in made:
        for owner, key in ((module, "in_proj_weight"), (module.out_proj, "weight")):
            setattr(owner, key, nn.Parameter(getattr(owner, key).detach().as_subclass(Labelled)))
    want, got = (module(**qkv_for(module))[0] for module in made)
    assert type(got) is type(want) is Labelled
    torch.testing.assert_close(got, want, **EXACT)


def test_parametrized_weights():
    made = pair("MultiheadAttention", E, H)
    for module in made:
        parametrizations.weight_norm(module, "in_proj_weight")
        parametrizations.orthogonal(module.out_proj, "weight")
    run_both(*made, lambda module, **x: module(**x), **qkv_for(made[0]))


def test_functional_call_and_per_sample_gradients():
    stock, ours = pair("MultiheadAttention", E, H, batch_first=True)
    x = qkv_for(ours, same=True)["x"]
    hidden = padding("right")
    parameters = {k: 2 * v.detach() for k, v in ours.named_parameters()}

    def loss(parameters, sample, row):
        given = (sample[None],) * 3
        return functional_call(ours, parameters, given, {"key_padding_mask": row[None]})[0].square().sum()

    got = vmap(grad(loss), (None, 0, 0))(parameters, x, hidden)
    stock.load_state_dict(parameters)
    for b in range(B):
        stock.zero_grad()
        stock(*(x[b : b + 1],) * 3, key_padding_mask=hidden[b : b + 1])[0].square().sum().backward()
        for k, v in stock.named_parameters():
            torch.testing.assert_close(got[k][b], v.grad, **EXACT)


def test_symbolic_trace_keeps_the_module_whole():
    class Model(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, hidden):
            return self.inner(x, x, x, key_padding_mask=hidden)[0]

    stock, ours = pair("MultiheadAttention", E, H, batch_first=True)
    traced, want = (torch.fx.symbolic_trace(Model(module)) for module in (ours, stock))
    assert [(n.op, n.name) for n in traced.graph.nodes] == [(n.op, n.name) for n in want.graph.nodes]
    x, hidden = qkv_for(ours, same=True)["x"], padding("right")
    torch.testing.assert_close(traced(x, hidden), want(x, hidden), **EXACT)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_are_left_to_torch():
    stock, ours = pair("MultiheadAttention", E, 2, batch_first=True)
    x = torch.nested.nested_tensor([tensor(3, E), tensor(5, E)])
    with torch.no_grad():
        got, want = (module.eval()(x, x, x, need_weights=False)[0] for module in (ours, stock))
    for a, b in zip(got.unbind(), want.unbind(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    same_error(stock.train(), ours.train(), x, x, x)
