"""The fused parts of Transformer layers: used where nobody can tell, and what somebody changed always counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from drop_in import EXACT, E, H, call_with, inputs_for, made, run_both
from torch import nn
from torch.nn.utils import parametrize

from fusedseq import registry

LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")
names = pytest.mark.parametrize("name", LAYERS)
orders = pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])


def fused(module, inputs):
    """How often each fused operator ran."""
    with registry.record() as ran:
        module(**inputs)
    return [sum(c.call.cell == op for c in ran) for op in ("layer_norm", "bias_activation")]


@names
@orders
def test_what_runs_in_one_pass(name, norm_first):
    _, ours = made(name, norm_first=norm_first, dropout=0.1)
    joins = 2 + ("Decoder" in name)
    x = inputs_for(name, ours)
    assert fused(ours.train(), x) == ([joins - 1, 2] if norm_first else [joins, 1])
    assert fused(ours.eval(), x) == ([joins - 1, 1] if norm_first else [joins, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(ours.float(), {k: t.float() for k, t in x.items()}) == [0, 0]


class Shift(nn.Module):
    def forward(self, x):
        return x + 0.25


class Loud(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_dropout(layer):
    layer.dropout1 = Shift()


def replaced_inner_dropout(layer):
    layer.dropout = Shift()


def subclassed_norm(layer):
    layer.norm2.__class__ = Loud


def hooked_norm(layer):
    layer.norm1.register_forward_hook(lambda m, args, out: out + 0.5)


def hooked_linear(layer):
    layer.linear1.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))


def hooked_linear2(layer):
    layer.linear2.register_forward_hook(lambda m, args, out: out - 1)


def backward_hook(layer):
    layer.dropout2.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))


def own_forward(layer):
    layer.norm2.forward = lambda x: x * 0.125


def own_activation(layer):
    layer.activation = lambda x: F.relu(x) + 0.5 * x


def hooked_activation(layer):
    layer.activation = nn.GELU(approximate="tanh")
    layer.activation.register_forward_hook(lambda m, args, out: out * 2)


def gelu_tanh(layer):
    layer.activation = nn.GELU(approximate="tanh")


def silu(layer):
    layer.activation = nn.SiLU()


def new_eps(layer):
    layer.norm1.eps = layer.norm2.eps = 0.3


def no_affine(layer):
    layer.norm2 = nn.LayerNorm(E, elementwise_affine=False)


def two_axes(layer):
    layer.norm2 = nn.LayerNorm((4, E), dtype=torch.float64)


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


def parametrized(layer):
    parametrize.register_parametrization(layer.linear1, "weight", Double())
    parametrize.register_parametrization(layer.norm1, "bias", Double())


def own_block(layer):
    layer._ff_block = lambda x: 0.5 * x


CHANGES = (
    replaced_dropout, replaced_inner_dropout, subclassed_norm, hooked_norm, hooked_linear, hooked_linear2,
    backward_hook, own_forward, own_activation, hooked_activation, gelu_tanh, silu, new_eps, no_affine, two_axes,
    parametrized, own_block,
)  # fmt: skip


@names
@orders
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_changed_parts_count(name, norm_first, change):
    modules = made(name, norm_first=norm_first)
    for module in modules:
        change(module)
    run_both(*modules, call_with({}), **inputs_for(name, modules[1]))


@names
@orders
def test_dropout_of_one_part(name, norm_first):
    stock, ours = made(name, norm_first=norm_first)
    x = inputs_for(name, ours)
    for p in (1.0, 0.5):
        for part in ("dropout", "dropout1", "dropout2"):
            for module in (stock, ours):
                for each in ("dropout", "dropout1", "dropout2"):
                    getattr(module, each).p = p if each == part else 0.0
            got = ours.train()(**x)
            if p == 1:
                torch.testing.assert_close(got, stock.train()(**x), **EXACT)
            else:
                assert not torch.equal(got, ours(**x))
            getattr(ours, part).eval()
            getattr(stock, part).eval()
            torch.testing.assert_close(ours(**x), stock(**x), **EXACT)


def test_global_hooks_are_heard():
    _, ours = made("TransformerEncoderLayer")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        ours(**inputs_for("TransformerEncoderLayer", ours))
    finally:
        handle.remove()
    assert seen.count("Dropout") == 3 and seen.count("LayerNorm") == 2 and "Linear" in seen


def test_nothing_is_overwritten_that_somebody_holds():
    _, ours = made("TransformerEncoderLayer", heads=H)
    x = inputs_for("TransformerEncoderLayer", ours)
    before = {k: t.clone() for k, t in x.items()}
    held = []
    ours.linear2.register_forward_pre_hook(lambda m, args: held.append((args[0], args[0].clone())))
    with torch.no_grad():
        for _ in range(2):
            ours(**x)
    assert all(torch.equal(a, b) for a, b in held) and all(torch.equal(x[k], before[k]) for k in x)
