"""A module of torch.nn and ours side by side: the same call on both must give the same outcome."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import fusedseq.nn as fnn
from fusedseq.testing.compare import judge

E, H, B, L, S = 12, 3, 4, 5, 7  # features, heads, batch, queries, keys
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64


def pair(name, *args, **kwargs):
    """torch's module and ours, under the same seed, in float64 unless told otherwise."""
    made = []
    for namespace in (nn, fnn):
        torch.manual_seed(0)
        made.append(getattr(namespace, name)(*args, **{"dtype": torch.float64, **kwargs}))
    return made


def tensor(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]


def outcome(module, call, inputs):
    """Outputs, and the gradients of inputs and parameters under random upstream gradients."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    result = call(module, **leaves)
    outs = flat(result)
    parameters = {name.removeprefix("_orig_mod."): p for name, p in module.named_parameters()}  # of torch.compile
    loss = sum((t * tensor(*t.shape, seed=3 + i, dtype=t.dtype)).sum() for i, t in enumerate(outs))
    grads = torch.autograd.grad(loss, [*leaves.values(), *parameters.values()], allow_unused=True)
    named = dict(zip([*leaves, *parameters], grads, strict=True))
    return result, {f"out{i}": t.detach() for i, t in enumerate(outs)}, {f"d{k}": g for k, g in named.items()}


def run_both(stock, ours, call, **inputs):
    """Outputs and gradients of `call(module, **inputs)`, compared; returns our result."""
    want, want_outs, want_grads = outcome(stock, call, inputs)
    got, outs, grads = outcome(ours, call, inputs)
    assert type(got) is type(want)
    assert outs.keys() == want_outs.keys()
    for name, t in {**want_outs, **want_grads}.items():
        mine = {**outs, **grads}[name]
        assert (mine is None) == (t is None), name
        if t is not None:
            torch.testing.assert_close(mine, t, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    return got


def by_the_rule(stock, ours, dtype, call, terms, **inputs):
    """Our errors against torch's in float64 are at most twice torch's own in the same dtype."""
    low = {name: t.to(dtype) for name, t in inputs.items()}
    stock, ours = stock.to(dtype), ours.to(dtype)
    peer, mine = (outcome(module, call, low) for module in (stock, ours))
    truth = outcome(copy.deepcopy(stock).double(), call, {name: t.double() for name, t in low.items()})
    results = [{k: t for part in (o[1], o[2]) for k, t in part.items() if t is not None} for o in (mine, truth, peer)]
    assert results[0].keys() == results[1].keys()
    wrong = [str(e) for e in judge(*results, dtype, terms=terms) if not e.ok]
    assert not wrong, "\n".join(wrong)


def call_with(given):
    return lambda module, **inputs: module(**inputs, **given)


def same_error(stock, ours, *args, **kwargs):
    with pytest.raises(Exception) as want:
        stock(*args, **kwargs)
    with pytest.raises(type(want.value)) as got:
        ours(*args, **kwargs)
    assert type(got.value) is type(want.value)
    assert str(got.value) == str(want.value)


def padding(kind, batch=B):
    """[B, S]; the first and the last key of a row are never both hidden."""
    lengths = torch.tensor([S, 3, 1, S - 1])[:batch, None]
    right = torch.arange(S) >= lengths
    if kind == "right":
        return right
    if kind == "left":
        return right.flip(1)
    if kind == "right_float":
        return torch.zeros(batch, S, dtype=torch.float64).masked_fill(right, float("-inf"))
    return tensor(batch, S, seed=9)


def table(kind, rows=L, batch=B, heads=H):
    """[L, S] or [B*H, L, S]; the first and the last key are always seen."""
    shape = (batch * heads, rows, S) if "3d" in kind else (rows, S)
    if "causal" in kind:
        hidden = torch.ones(shape, dtype=torch.bool).triu(1)
    elif "bool" in kind:
        hidden = tensor(*shape, seed=5) > 0.3
        hidden[..., 0] = hidden[..., -1] = False
    else:
        return tensor(*shape, seed=6)
    return torch.zeros(shape, dtype=torch.float64).masked_fill(hidden, float("-inf")) if "inf" in kind else hidden


# name: (key_padding_mask, attn_mask, is_causal)
MASKS = {
    "none": (None, None, False),
    "right": ("right", None, False),
    "left": ("left", None, False),
    "right_float": ("right_float", None, False),
    "added_padding": ("added", None, False),
    "bool": (None, "bool", False),
    "float": (None, "float", False),
    "bool3d": (None, "bool3d", False),
    "float3d": (None, "float3d", False),
    "causal": (None, "causal", False),
    "causal_inf": (None, "causal_inf", False),
    "causal_hint": (None, "causal_inf", True),
    "causal_right": ("right", "causal", True),
    "causal_right_float": ("right_float", "causal_inf", True),
    "bool_right": ("right", "bool", False),
    "bool3d_left": ("left", "bool3d", False),
    "float_added": ("added", "float", False),
    "float3d_right": ("right_float", "float3d", False),
    "wrong_hint_right": ("right", "bool", True),
}


def masks_for(name, form="batched", rows=L, heads=H):
    """What MultiheadAttention takes, for `rows` queries and S keys."""
    kpm, attn, causal = MASKS[name]
    batch = B if form == "batched" else 1
    kpm = None if kpm is None else padding(kpm, batch)
    return {
        "key_padding_mask": kpm if kpm is None or form == "batched" else kpm[0],
        "attn_mask": None if attn is None else table(attn, rows, batch, heads),
        "is_causal": causal,
    }


MHA_OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "nobias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both_extra": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "kdim": {"kdim": 5, "vdim": 8},
    "vdim_extra": {"vdim": 2, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


def qkv_for(module, form="batched", same=False, dtype=torch.float64, batch=B):
    """query, key and value; one tensor for all three if `same`."""

    def one(length, features, seed):
        shape = (length, features)
        if form == "batched":
            shape = (batch, length, features) if module.batch_first else (length, batch, features)
        return tensor(*shape, seed=seed, dtype=dtype)

    if same:
        return {"x": one(S, E, 1)}
    return {"query": one(L, E, 1), "key": one(S, module.kdim, 2), "value": one(S, module.vdim, 4)}


T = 5  # of the target; S of the source


TRANSFORMERS = (
    "TransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerDecoderLayer",
    "TransformerDecoder",
    "Transformer",
)


LAYER_OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "norm_first": {"norm_first": True},
    "nobias": {"bias": False, "layer_norm_eps": 1e-2},
    "gelu": {"activation": "gelu", "batch_first": True, "norm_first": True},
    "callable": {"activation": torch.tanh},
    "module": {"activation": nn.PReLU(dtype=torch.float64), "batch_first": True},
    "everything": {"activation": F.gelu, "batch_first": True, "norm_first": True, "bias": False, "layer_norm_eps": 0.1},
}


def made(name, heads=H, features=E, **kwargs):
    """torch's module and ours, under the same seed; stacks have two layers and, for the encoder, a norm."""
    kwargs = {"dropout": 0.0, **copy.deepcopy(kwargs)}
    if name == "Transformer":
        return pair(name, features, heads, 2, 2, 17, **kwargs)
    if name.endswith("Layer"):
        return pair(name, features, heads, 17, **kwargs)
    dtype = kwargs.get("dtype", torch.float64)
    stacks = []
    for namespace, layer in zip((nn, fnn), pair(f"{name}Layer", features, heads, 17, **kwargs), strict=True):
        norm = nn.LayerNorm(features, dtype=dtype) if name == "TransformerEncoder" else None
        stacks.append(getattr(namespace, name)(layer, 2, norm))
    return stacks


def is_encoder(name):
    return "Encoder" in name


def inputs_for(name, module, form="batched", batch=B, features=E):
    first = not any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in module.modules())

    def one(length, seed):
        shape = (length, features)
        if form == "batched":
            shape = (batch, length, features) if first else (length, batch, features)
        return tensor(*shape, seed=seed)

    if is_encoder(name):
        return {"src": one(S, 1)}
    tgt = {"tgt": one(T, 2)}
    return {"src": one(S, 1), **tgt} if name == "Transformer" else {**tgt, "memory": one(S, 1)}


def arguments_for(name, self_mask, cross_mask="none", form="batched", heads=H):
    """The masks of test_mha by the names that the module has for them; the target's self-attention is causal."""
    here = masks_for(self_mask, form, S, heads)
    prefix = "src" if "Layer" in name else ""
    if is_encoder(name):
        return {
            f"{prefix}_mask" if prefix else "mask": here["attn_mask"],
            "src_key_padding_mask": here["key_padding_mask"],
            "is_causal": here["is_causal"],
        }
    there = masks_for(cross_mask, form, T, heads)
    given = {
        "tgt_mask": None if self_mask == "none" else torch.ones(T, T, dtype=torch.bool).triu(1),
        "memory_mask": there["attn_mask"],
        "tgt_key_padding_mask": None if here["key_padding_mask"] is None else here["key_padding_mask"][..., :T],
        "memory_key_padding_mask": there["key_padding_mask"],
        "memory_is_causal": there["is_causal"],
    }
    if name == "Transformer":
        source = {"src_mask": here["attn_mask"], "src_key_padding_mask": here["key_padding_mask"]}
        return {**given, **source, "src_is_causal": here["is_causal"]}
    return given


class Everything64(TorchFunctionMode):
    """Keeps float64 what models turn into float32 by name: norms, rotary angles, a softmax."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype is torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)
