"""Attention by its definition, for test_attention_properties: written from docs/attention.md and the docstrings alone.

A `Call` holds what a user passes; `formula` computes it in any dtype, step by step and on whole L x S tables, and
leaves the derivatives to autograd. It shares no code with fusedseq/reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fusedseq
from fusedseq import Mask
from fusedseq.ops import attention_check
from fusedseq.testing.attention_cases import AttentionCase, AttentionInputs
from fusedseq.testing.attention_compare import AttentionBaseline, _peer, judge_attention, terms

INF = float("inf")
DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


@dataclass
class Call:
    q: Tensor  # [B, Hq, L, E]
    k: Tensor  # [B, Hkv, S, E]
    v: Tensor  # [B, Hkv, S, Ev]
    options: dict[str, Any] = field(default_factory=dict)  # of fusedseq.attention, but for mask
    structure: dict[str, Any] = field(default_factory=dict)  # of fusedseq.Mask
    bias_as_dense: bool = False  # the floating bias is handed over as Mask(dense=...)

    def leaves(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, **self.options}
        return {name: named[name] for name in DIFFERENTIABLE if named.get(name) is not None}

    def replaced(self, **tensors: Tensor) -> Call:
        qkv = {name: tensors.pop(name, getattr(self, name)) for name in ("q", "k", "v")}
        return Call(**qkv, options={**self.options, **tensors}, structure=self.structure,
                    bias_as_dense=self.bias_as_dense)  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        options, structure = dict(self.options), dict(self.structure)
        if self.bias_as_dense and "bias" in options:
            structure["dense"] = options.pop("bias")
        return {**options, "mask": Mask(**structure) if structure else None}

    def ours(self) -> tuple[Tensor, Tensor]:
        return fusedseq.attention(self.q, self.k, self.v, **self.arguments(), return_lse=True)


def places(call: Call) -> tuple[Tensor, Tensor]:
    """bool [B, L, S]: the key belongs to the query's row or sequence; int [B, L]: the key at which it stands."""
    B, _, L, _ = call.q.shape
    S = call.k.shape[2]
    bottom = call.structure.get("causal") == "bottom-right"
    belongs, stands = torch.zeros(B, L, S, dtype=torch.bool), torch.zeros(B, L, dtype=torch.int64)
    cu, lengths = call.structure.get("cu_seqlens"), call.structure.get("key_lengths")
    if cu is None:
        for b in range(B):
            end = S if lengths is None else int(lengths[b])
            belongs[b, :, :end] = True
            stands[b] = torch.arange(L) + (end - L if bottom else 0)
        return belongs, stands
    cu_q, cu_k = (cu, cu) if isinstance(cu, Tensor) else cu
    for n in range(len(cu_q) - 1):
        (i0, i1), (j0, j1) = ((int(c[n]), int(c[n + 1])) for c in (cu_q, cu_k))
        belongs[0, i0:i1, j0:j1] = True
        stands[0, i0:i1] = j0 + torch.arange(i1 - i0) + ((j1 - j0) - (i1 - i0) if bottom else 0)
    return belongs, stands


def seen(call: Call) -> Tensor:  # bool [B, 1, L, S], or with the heads of a dense table
    belongs, stands = places(call)
    offset = torch.arange(call.k.shape[2]) - stands.unsqueeze(-1)  # how far right of its place a key is
    if call.structure.get("causal"):
        belongs = belongs & (offset <= 0)
    left, right = (None if side == -1 else side for side in call.structure.get("window") or (None, None))
    near = torch.ones_like(belongs)
    if left is not None:
        near &= offset >= -left
    if right is not None:
        near &= offset <= right
    if (tokens := call.structure.get("global_tokens")) is not None:
        near |= tokens.expand(len(near), -1).unsqueeze(1)
    visible = (belongs & near).unsqueeze(1)
    dense = call.structure.get("dense")
    return visible if dense is None else visible & dense


def keep(call: Call) -> Tensor:  # float64 [B, Hq, L, S]: 0, or 1 / (1 - p)
    """Dropout as the docstring of fusedseq.attention counts it; Philox in numpy's wrapping 64-bit integers."""
    (B, H, L, _), S = call.q.shape, call.k.shape[2]
    p, seed = call.options["dropout_p"], int(call.options["seed"])
    b, h, i, j = np.ogrid[:B, :H, :L, :S]
    low = np.uint64(0xFFFFFFFF)
    x = [np.broadcast_to(c, (B, H, L, S)).astype(np.uint64) for c in (16 * (j // 64) + j % 16, i, h, b)]
    key = [np.uint64(seed % 2**32), np.uint64((seed >> 32) % 2**32)]
    for _ in range(10):
        first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [
            (second >> np.uint64(32)) ^ x[1] ^ key[0],
            second & low,
            (first >> np.uint64(32)) ^ x[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    word = np.choose(np.broadcast_to((j // 16) % 4, (B, H, L, S)), x)
    kept = word >= round(p * 2**32)
    return torch.from_numpy(kept / (1 - p) if p < 1 else np.zeros(kept.shape))


def formula(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out in the dtype of q (float64 if that is what it is computed in), lse in that of the computation."""
    q, k, v = (t.to(dtype) for t in (call.q, call.k, call.v))
    groups = q.shape[1] // max(k.shape[1], 1)
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    given = call.options
    scale = given.get("scale")
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if (cap := given.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    if given.get("bias") is not None:
        logits = logits + given["bias"].to(dtype)
    if given.get("alibi_slopes") is not None:
        distance = (places(call)[1].unsqueeze(-1) - torch.arange(k.shape[2])).abs().unsqueeze(1)
        logits = logits - given["alibi_slopes"].to(dtype)[:, None, None] * distance.to(dtype)
    logits = logits.masked_fill(~seen(call), -INF)
    S = logits.shape[-1]
    if given.get("sinks") is not None:
        sinks = given["sinks"].to(dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], -1)
    if logits.shape[-1] == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1]).to(call.q.dtype), v.new_full(q.shape[:3], -INF)
    peak = logits.detach().amax(-1, keepdim=True)
    weights = (logits - torch.where(peak == -INF, 0.0, peak)).exp()
    total = weights.sum(-1, keepdim=True)
    none = total == 0
    total = total.masked_fill(none, 1.0)
    lse = (peak + total.log()).masked_fill(none, -INF).squeeze(-1)
    weights = (weights / total)[..., :S]
    if given.get("dropout_p"):
        weights = weights * keep(call).to(dtype)
    return (weights @ v).to(call.q.dtype if dtype != torch.float64 else dtype), lse


def outcome(call: Call, function: Any, dout: Tensor, dlse: Tensor | None) -> dict[str, Tensor]:
    """out, lse and the gradient of every input, "d" before its name."""
    leaves = {name: t.detach().requires_grad_() for name, t in call.leaves().items()}
    out, lse = function(call.replaced(**leaves))
    heads, upstream = [out], [dout.to(out.dtype)]
    if dlse is not None and lse.requires_grad:
        heads, upstream = [out, lse], [dout.to(out.dtype), dlse.to(lse.dtype)]
    grads: Any = [None] * len(leaves)
    if out.requires_grad:
        grads = torch.autograd.grad(heads, list(leaves.values()), upstream, allow_unused=True)
    named = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        named["d" + name] = torch.zeros_like(leaf) if grad is None else grad
    return named


def judge(call: Call, dout: Tensor, dlse: Tensor | None, got: dict[str, Tensor]) -> list[str]:
    """What is wrong by the project's rule; the truth is the formula in float64, the peer the formula in q's dtype.

    Autograd's softmax cancels to exactly 0 where a query sees one key. No kernel that forms D = dout . out does, nor
    does torch's: what fails is judged again beside torch's kernel, or, where torch has none for the call, beside the
    specification's backward pass.
    """
    dtype = call.q.dtype
    exact = call.replaced(**{name: t.double() for name, t in call.leaves().items()})
    truth = outcome(exact, lambda c: formula(c, torch.float64), dout, dlse)
    unset = dict.fromkeys(("bias", "alibi_slopes", "sinks", "scale", "softcap", "seed"))
    mask = Mask(**call.structure)
    problem = attention_check.problem(call.q, call.k, call.v, mask, **{**unset, "dropout_p": 0.0, **call.options})
    inputs = AttentionInputs(AttentionCase("B1H1L1S1E1"), problem, dout, dlse)
    sums = terms(inputs.to(torch.float64))
    peer = truth if dtype == torch.float64 else outcome(call, lambda c: formula(c, dtype), dout, dlse)
    errors = [e for e in judge_attention(got, AttentionBaseline(inputs, truth, peer, sums)) if not e.ok]
    if errors and dtype != torch.float64:
        base = AttentionBaseline(inputs, truth, _peer(inputs), sums)
        # Rounding only: a peer that computes something else than the formula excuses nothing.
        rounding = torch.finfo(dtype).eps ** 0.5
        fine = {e.name for e in judge_attention(got, base) if e.ok and e.norm < rounding}
        errors = [e for e in errors if e.name not in fine]
    return [str(e) for e in errors]
