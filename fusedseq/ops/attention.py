"""Attention as users call it.

As for the scan, ordinary eager calls go straight to the backend that the registry chose; whatever watches or transforms
operators is given `fusedseq::attention` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fusedseq import registry
from fusedseq.ops import attention_check as check
from fusedseq.ops import attention_library as library
from fusedseq.ops import attention_repeat
from fusedseq.ops.check import _bad_value, _shape
from fusedseq.ops.mask import Mask
from fusedseq.ops.scan import (
    _PLAIN,
    _dispatch_modes,
    _function_modes,
    _interpreters,
    _is_compiling,
    _is_grad_enabled,
    _tracing_state,
    is_autocasting,
)
from fusedseq.reference import attention as reference
from fusedseq.reference.attention import Problem


def _is_ordinary(p: Problem) -> bool:
    if _interpreters() is not None or _dispatch_modes() or _function_modes() or _tracing_state() is not None:
        return False
    return all(t is None or type(t) in _PLAIN for t in p.tensors()) and not p.q.is_meta


class Attention(_SingleLevelFunction):
    """The lean autograd path: one call, run by a backend that has been chosen.

    What torch.autograd.Function adds in Python is for torch.func, which never gets here.
    """

    apply: Any  # inherited from C++, where mypy cannot see it

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, p: Problem, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = backend.attention_forward(p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*p.tensors(), out, lse)
        ctx.backend, ctx.numbers = backend, p[library._TENSORS :]
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * (2 + library.DIFFERENTIABLE)
        *tensors, out, lse = ctx.saved_tensors
        p = Problem(*tensors, *ctx.numbers)
        return (None, None, *library.gradients(ctx.backend, p, out, lse, dout, dlse, ctx.needs_input_grad[2:]))


def run(p: Problem) -> tuple[Tensor, Tensor]:
    """out and lse of a problem whose sizes have not been checked yet."""
    known = attention_repeat.recall(p)
    if known is not None:
        return known
    inputs = p.inputs()
    if _is_compiling() or not _is_ordinary(p) or forward_ad._current_level >= 0:
        grad = _is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        grad = grad and _tracing_state() is None  # what is recorded must not hang on it
        return torch.ops.fusedseq.attention.default(*p, grad, registry.forced())
    if is_autocasting() and torch.is_autocast_enabled(p.q.device.type):
        p = library.autocast(p.q.device.type, p)
        inputs = p.inputs()
    check.shapes(p)
    p = check.data(p)
    grad = _is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    backend = registry.choose(registry.attention_call(p, grad))
    result = Attention.apply(backend, p, *inputs) if grad else backend.attention_forward(p)
    attention_repeat.remember(p, backend)
    return result


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None = ..., bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., dropout_p: float = ..., seed: int | Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None = ..., bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., dropout_p: float = ..., seed: int | Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,  # [B, Hq, L, E]
    k: Tensor,  # [B, Hkv, S, E]
    v: Tensor,  # [B, Hkv, S, Ev]
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,  # broadcastable to [B, Hq, L, S]
    alibi_slopes: Tensor | None = None,  # [Hq]
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(logits) v, without ever storing the L x S logits (Dao et al. 2022, arXiv:2205.14135).

    The logit of query i and key j in head h is, in this order: scale q_i . k_j; with `softcap` c: c tanh(. / c) (Gemma
    2, arXiv:2408.00118); plus `bias`; minus alibi_slopes[h] |p - j|, where p is the key that the query is aligned with,
    see `Mask` (ALiBi, arXiv:2108.12409). It computes in float32 (float64 for float64) whatever dtype the inputs have.

    Args:
        q, k, v: float32, float64, bfloat16 or float16, one dtype, any strides. Hkv divides Hq: query head h uses key
            head h // (Hq / Hkv). Ev may differ from E.
        mask: structure, see `Mask`. None: every query sees every key.
        bias: of the dtype of q or float32, differentiable; a dimension of size 1 is broadcast, and its gradient summed
            in a fixed order. An entry of -inf hides the key.
        alibi_slopes: any floating dtype, differentiable.
        scale: 1 / sqrt(E) by default; may be negative.
        softcap: a positive bound for the logits before bias and ALiBi.
        sinks: a logit per head that counts in the softmax's denominator and nowhere else (arXiv:2309.17453; gpt-oss).
            Any floating dtype, differentiable.
        dropout_p: probability with which each softmax weight is zeroed; the others are scaled by 1 / (1 - p). The
            denominator and lse are those without dropout.
        seed: of dropout, an int or an int64 tensor of one element; drawn from torch's generator by default. Key j of
            query (b, h, i) is dropped if word (j // 16) % 4 of Philox 4x32-10 (Salmon et al. 2011,
            doi:10.1145/2063384.2063405) with counter (16 (j // 64) + j % 16, i, h, b) and key (seed mod 2^32, seed
            // 2^32) is below round(p 2^32): the same on every backend.
        return_lse: also return lse.

    Returns:
        out [B, Hq, L, Ev] in the dtype of q; with return_lse also lse [B, Hq, L], float32 (float64 for float64): the
        logarithm of the sum of exp(logit) over the keys seen and the sink. Both are differentiable any number of times;
        with lse, results over parts of the keys can be merged. A query that sees no key has out 0 and lse -inf (the
        sink's logit if there is one), and gradients of 0.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument, what was expected and what came.
    """
    out, lse = run(
        check.problem(q, k, v, mask, bias, alibi_slopes, sinks, scale, softcap, dropout_p, seed)
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_probs(
    q: Tensor,  # [B, Hq, L, E]
    k: Tensor,  # [B, Hkv, S, E]
    lse: Tensor,  # [B, Hq, L]
    *,
    heads: Sequence[int] | Tensor | None = None,
    rows: Sequence[int] | Tensor | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:  # [B, heads, rows, S]
    """The softmax weights of chosen heads and rows, recomputed from what `attention(..., return_lse=True)` returned.

    Arguments as there; `heads` and `rows` are indices (all by default). Sinks need not be named, as lse has them, and
    dropout has no part in it. float32 (float64 for float64), differentiable. Costs memory and time for the rows asked
    for only.
    """
    p = check.problem(q, k, k, mask, bias, alibi_slopes, None, scale, softcap, 0.0, None)
    check.shapes(p)
    if lse.shape != q.shape[:3]:
        _bad_value("lse", f"shape {_shape(q.shape[:3])}", _shape(lse.shape))
    picked = []
    for name, at, size in (("heads", heads, q.shape[1]), ("rows", rows, q.shape[2])):
        index = None if at is None else torch.as_tensor(at, dtype=torch.int64, device=q.device)
        if index is not None:
            if index.dim() != 1:
                _bad_value(name, "a list of indices", _shape(index.shape))
            if not _is_compiling() and bool(((index < -size) | (index >= size)).any()):
                _bad_value(name, f"indices below {size}", index.tolist())
            index = torch.where(index < 0, index + size, index)
        picked.append(index)
    with torch.autocast(q.device.type, enabled=False):  # lse was computed in float32 from the inputs as they are
        return reference.probabilities(check.data(p), lse, *picked)
