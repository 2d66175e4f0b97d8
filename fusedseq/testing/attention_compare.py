"""When is attention right: the rule of `compare`, with the terms that a gradient cancels from counted in.

The truth is the specification in float64. The peer is torch's own kernel where torch has the feature, else the
specification computing every step in the dtype under test. A gradient of a logit is P (dP - D), which cancels to
nothing where a query sees hardly more than one key, while its rounding is that of the terms; so the floor is relative
to the larger of the truth and a quarter of what the gradient would be if nothing cancelled there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedseq.reference import attention as reference
from fusedseq.reference.attention import Problem

from .attention_cases import AttentionCase, AttentionInputs, make_attention
from .cases import short
from .compare import FACTOR, FLOORS, HALF, Error, Outcome, _sizes

Attention = Callable[[Problem], tuple[Tensor, Tensor]]
_NAMES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
_torch_sdpa = F.scaled_dot_product_attention
TERMS = 0.25


def torch_has_attention(p: Problem) -> bool:
    """Whether torch computes the same with its own kernel, lse aside."""
    odd = (p.alibi_slopes, p.sinks, p.key_lengths, p.cu_q, p.global_keys)
    if any(t is not None for t in odd) or p.softcap or p.dropout_p or p.left >= 0 or p.right > 0:
        return False
    causal = p.causal == reference.BOTTOM_RIGHT or (p.right == 0 and not p.causal)
    both = p.bias is not None and (p.dense is not None or p.causal != 0)
    return not (causal or both or 0 in p.q.shape or 0 in p.k.shape or (p.dense is not None and p.causal))


def torch_attention(p: Problem) -> tuple[Tensor, Tensor]:
    """torch's kernel, and lse by the specification's formula in the same dtype."""
    with torch.no_grad():
        _, lse = reference.forward(p)
    table = p.bias if p.dense is None else p.dense
    out = _torch_sdpa(
        p.q, p.k, p.v, table, is_causal=p.causal != 0, scale=p.scale, enable_gqa=p.q.shape[1] != p.k.shape[1]
    )
    return out, lse


def naive_attention(p: Problem) -> tuple[Tensor, Tensor]:
    """The specification with every operation rounded to the dtype of the inputs."""
    return reference.forward(p, compute_dtype=p.q.dtype)


def evaluate_attention(attention: Attention, inputs: AttentionInputs) -> Outcome:
    """out, lse and, with `d` before its name, the gradient of every input that was given."""
    p = inputs.problem
    leaves = {name: t.detach().requires_grad_() for name in _NAMES if (t := getattr(p, name)) is not None}
    out, lse = attention(p._replace(**leaves))
    heads, upstream = [out], [inputs.dout]
    if inputs.dlse is not None and lse.requires_grad:
        heads, upstream = [out, lse], [inputs.dout, inputs.dlse]
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if out.requires_grad:
        grads = torch.autograd.grad(heads, list(leaves.values()), upstream, allow_unused=True)
    outcome = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        outcome["d" + name] = torch.zeros_like(leaf) if grad is None else grad.detach()
    return outcome


def _peer(inputs: AttentionInputs) -> Outcome:
    p = inputs.problem
    if torch_has_attention(p) and inputs.dlse is None:
        return evaluate_attention(torch_attention, inputs)
    # The specification's own backward, since autograd would keep the float32 steps of a half type.
    out, lse = naive_attention(p)
    grads = reference.backward(p, inputs.dout, inputs.dlse, compute_dtype=p.q.dtype)
    named = {"d" + name: g for name, g in zip(_NAMES, grads, strict=True) if g is not None}
    return {"out": out, "lse": lse, **named}


def terms(inputs: AttentionInputs) -> dict[str, tuple[float, float]]:
    """Norm and maximum of each gradient if P (|dP| + |D|) took the place of |P (dP - D)|; the inputs are float64."""
    p = inputs.problem
    scores = reference._scores(p, torch.float64)
    P, lse = reference._normalize(scores.logits, p.sinks)
    G = p.q.shape[1] // max(p.k.shape[1], 1)
    k, v = p.k.abs().repeat_interleave(G, 1), reference._values(p, torch.float64)
    weight = P * reference.dropout_scale(p).double() if p.dropout_p else P
    dP, D = (inputs.dout @ v.transpose(-2, -1)).abs(), (inputs.dout * (weight @ v)).sum(-1).abs()
    if inputs.dlse is not None:
        D = D + torch.where(lse == -math.inf, 0.0, inputs.dlse.double().abs())
    dS = weight * dP + P * D.unsqueeze(-1)
    sizes = {"dq": abs(p.scale) * (dS @ k), "dk": abs(p.scale) * (dS.transpose(-2, -1) @ p.q.abs())}
    if p.bias is not None:
        sizes["dbias"] = dS.sum_to_size(p.bias.shape)
    if p.alibi_slopes is not None and scores.distance is not None:
        sizes["dalibi_slopes"] = (dS * scores.distance).sum((0, 2, 3))
    if p.sinks is not None:
        sizes["dsinks"] = ((p.sinks[:, None] - lse).exp() * D).sum((0, 2))
    if G > 1:
        sizes["dk"] = sizes["dk"].unflatten(1, (-1, G)).sum(2)
    return {name: _sizes(t) for name, t in sizes.items()}


@dataclass(frozen=True)
class AttentionBaseline:
    inputs: AttentionInputs
    truth: Outcome
    peer: Outcome
    terms: dict[str, tuple[float, float]]


@functools.lru_cache(maxsize=256)
def attention_baseline(case: AttentionCase, dtype: torch.dtype, seed: int = 0) -> AttentionBaseline:
    """Made once for all backends."""
    return compare_with(make_attention(case, dtype, seed=seed))


def compare_with(inputs: AttentionInputs) -> AttentionBaseline:
    exact = inputs.to(torch.float64)
    return AttentionBaseline(inputs, evaluate_attention(reference.forward, exact), _peer(inputs), terms(exact))


def judge_attention(outcome: Outcome, base: AttentionBaseline) -> list[Error]:
    """Measure every tensor of an outcome. What is infinite must be so in all the same places."""
    dtype = base.inputs.problem.q.dtype
    S = base.inputs.problem.k.shape[2]
    if outcome.keys() != base.truth.keys():
        raise AssertionError(f"different tensors: {sorted(outcome)}, {sorted(base.truth)}")
    errors = []
    for name, there in outcome.items():
        out = there.cpu()
        ref, peer = base.truth[name], base.peer[name].double()
        kind = out.dtype if name in ("lse", "dbias") else dtype
        growth = 1.0 if kind in HALF else max(1.0, math.log2(max(S, 1)) / 4)
        roundings = 2.0 if kind in HALF and name.startswith("d") else 1.0
        assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
        finite = ref.isfinite()
        assert torch.equal(out.isfinite(), finite), f"{name}: not finite elsewhere than the truth"
        mine = _sizes(torch.where(finite, out.double() - ref, 0.0))
        theirs = _sizes(torch.where(finite & peer.isfinite(), peer - ref, 0.0))
        scales = _sizes(torch.where(finite, ref, 0.0))
        sums = base.terms.get(name, (0.0, 0.0))
        units = [max(scale, TERMS * sum) or 1.0 for scale, sum in zip(scales, sums, strict=True)]
        allowed = [
            FACTOR * error / unit + floor * torch.finfo(kind).eps * growth * roundings
            for error, floor, unit in zip(theirs, FLOORS[kind], units, strict=True)
        ]
        errors.append(Error(name, mine[0] / units[0], allowed[0], mine[1] / units[1], allowed[1]))
    return errors


def check_attention(
    attention: Attention, case: AttentionCase, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> None:
    """Assert that an implementation computes a case right: out, lse and the gradient of every input."""
    base = attention_baseline(case, dtype, seed)
    inputs = base.inputs if device == "cpu" else make_attention(case, dtype, device, seed)
    wrong = [str(e) for e in judge_attention(evaluate_attention(attention, inputs), base) if not e.ok]
    if wrong:
        raise AssertionError("\n  ".join([f"attention-{short(dtype)}-{case.text}", *wrong]))
