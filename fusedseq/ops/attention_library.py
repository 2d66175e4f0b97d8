"""`fusedseq::attention` and `fusedseq::attention_backward`, and their derivatives.

The operators take the fields of a `Problem` in order and the name of a backend, "" leaving the choice to the registry.
What does not apply comes back with shape [0]. Autograd is written out as in `derivative`, so that torch.func may
differentiate and map the operators; second derivatives and forward mode go through the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from fusedseq import registry
from fusedseq.backends import reference
from fusedseq.ops import attention_check as check
from fusedseq.ops import batching
from fusedseq.ops.derivative import _below, _dual, is_watched
from fusedseq.reference.attention import Problem

DIFFERENTIABLE = 6  # the first fields of a Problem: q, k, v, bias, alibi_slopes, sinks
_TENSORS = 12  # all tensors of a Problem come before its numbers
_COUNT = len(Problem._fields)

_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? dense, "
    "Tensor? key_lengths, Tensor? cu_q, Tensor? cu_k, Tensor? global_keys, Tensor? seed, int causal, SymInt left, "
    "SymInt right, float scale, float softcap, float dropout_p"
)
_lib = torch.library.Library("fusedseq", "FRAGMENT")
_lib.define(
    f"attention({_PROBLEM}, bool grad, str backend) -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,)
)
_lib.define(
    f"attention_backward(Tensor? dout, Tensor? dlse, {_PROBLEM}, Tensor out, Tensor lse, bool[] needs, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi, Tensor dsinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_attention = torch.ops.fusedseq.attention.default
_attention_backward = torch.ops.fusedseq.attention_backward.default


def out_like(q: Tensor, Ev: int) -> Tensor:  # [B, Hq, L, Ev]
    """An unwritten output that lies in memory as q does: heads behind the sequence where those of q are."""
    B, H, L, _ = q.shape
    if H > 1 and L > 1 and q.stride(1) < q.stride(2):
        return q.new_empty((B, L, H, Ev)).transpose(1, 2)
    return q.new_empty((B, H, L, Ev))


def lse_like(q: Tensor) -> Tensor:  # [B, Hq, L]
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    return t if t.stride() == like.stride() else like.copy_(t)


def _attention_impl(*args: Any) -> tuple[Tensor, Tensor]:
    p, grad, backend = Problem(*args[:_COUNT]), args[_COUNT], args[_COUNT + 1]
    check.shapes(p)
    p = check.data(p)
    module = registry.choose(registry.attention_call(p, grad), backend)
    out, lse = module.attention_forward(p)
    return _laid_out(out, out_like(p.q, p.v.shape[3])), lse.contiguous()


def _attention_fake(*args: Any) -> tuple[Tensor, Tensor]:
    p = Problem(*args[:_COUNT])
    check.shapes(p)
    return out_like(p.q, p.v.shape[3]), lse_like(p.q)


def _backward_impl(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p, (out, lse, needs, backend) = Problem(*args[:_COUNT]), args[_COUNT:]
    check.shapes(p)
    p = check.data(p)
    if dout is None and dlse is None:
        return tuple(torch.zeros_like(g) for g in _gradients_fake(p, needs))
    module = registry.choose(registry.attention_call(p, True), backend)
    grads = module.attention_backward(p, out, lse, dout, dlse, needs)
    return tuple(
        like if g is None else _laid_out(g, like) for g, like in zip(grads, _gradients_fake(p, needs), strict=True)
    )


def _gradients_fake(p: Problem, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t) if need and t is not None else p.q.new_empty(0)
        for t, need in zip(p.inputs(), needs, strict=True)
    )


def _backward_fake(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _gradients_fake(Problem(*args[:_COUNT]), args[_COUNT + 2])


def call_backward(
    p: Problem, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None, needs: Sequence[bool], backend: str
) -> tuple[Tensor | None, ...]:
    """The operator, with None for what is not needed."""
    grads = _attention_backward(dout, dlse, *p, out, lse, list(needs), backend)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def gradients(
    backend: ModuleType,
    p: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    flags: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of `p.inputs()` where flagged, by the backend that ran forward; by the operator if they are differentiated."""
    needs = needed(p, flags)
    if is_watched(dout, dlse):
        return call_backward(p, out, lse, dout, dlse, needs, backend.name)
    grads: tuple[Tensor | None, ...] = backend.attention_backward(p, out, lse, dout, dlse, needs)
    return grads


def needed(p: Problem, flags: Sequence[bool]) -> list[bool]:
    return [flag and t is not None for t, flag in zip(p.inputs(), flags, strict=True)]


class _Attention(_SingleLevelFunction):
    apply: Any

    @staticmethod
    def forward(ctx: Any, keys: Any, numbers: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = _below(_attention, keys, (*tensors, *numbers))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.numbers = numbers
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, out, lse = ctx.saved_tensors
        *numbers, _, backend = ctx.numbers
        p = Problem(*tensors, *numbers)
        needs = needed(p, ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE])
        grads = call_backward(p, out, lse, dout, dlse, needs, backend)
        return (None, None, *grads, *(None,) * (_TENSORS - DIFFERENTIABLE))


class _AttentionBackward(_SingleLevelFunction):
    apply: Any

    @staticmethod
    def forward(ctx: Any, keys: Any, numbers: tuple[Any, ...], rest: Any, *tensors: Any) -> tuple[Tensor, ...]:
        upstream, problem, results = tensors[:2], tensors[2:-2], tensors[-2:]
        needs = rest[0]
        grads = _below(_attention_backward, keys, (*upstream, *problem, *numbers, *results, *rest))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(g for g, need in zip(grads, needs, strict=True) if not need))
        ctx.save_for_backward(*tensors[:-2])
        ctx.numbers, ctx.needs = numbers, needs
        return grads

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Double backward. out and lse count as functions of the other inputs, which the specification makes them."""
        tensors = ctx.saved_tensors
        movable = [i for i in range(2 + DIFFERENTIABLE) if tensors[i] is not None]
        wanted = [i for i, g in enumerate(cotangents) if g is not None and ctx.needs[i]]
        result: list[Any] = [None] * (len(tensors) + 2)

        def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = list(tensors)
            for i, t in zip(movable, primals, strict=True):
                full[i] = t
            p = Problem(*full[2:], *ctx.numbers)
            grads = reference.attention_backward(p, p.q, p.q, full[0], full[1], ctx.needs)
            return tuple(g for i in wanted if (g := grads[i]) is not None)

        if wanted:
            pull: Any = torch.func.vjp(gradients, *(tensors[i] for i in movable))[1]
            for i, g in zip(movable, pull(tuple(cotangents[i] for i in wanted)), strict=True):
                result[i] = g
        return (None, None, None, *result)


def _differentiates(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _attention_autograd(keys: Any, *args: Any) -> tuple[Tensor, Tensor]:
    if _dual(args):
        p = check.data(Problem(*args[:_COUNT]))
        return registry.choose(registry.attention_call(p, True), reference.name).attention_forward(p)
    if _differentiates(args):
        with enable_single_level_autograd_function():
            return _Attention.apply(keys, args[_TENSORS:], *args[:_TENSORS])
    return _below(_attention, keys, args)


def _backward_autograd(keys: Any, *args: Any) -> tuple[Tensor, ...]:
    tensors, numbers, rest = args[: 2 + _TENSORS], args[2 + _TENSORS : 2 + _COUNT], args[2 + _COUNT :]
    if _dual(args):
        p = check.data(Problem(*tensors[2:], *numbers))
        grads = reference.attention_backward(p, p.q, p.q, args[0], args[1], rest[2])
        return tuple(p.q.new_empty(0) if g is None else g for g in grads)
    if _differentiates(args):
        with enable_single_level_autograd_function():
            return _AttentionBackward.apply(keys, numbers, rest[2:], *tensors, *rest[:2])
    return _below(_attention_backward, keys, args)


def autocast(device: str, p: Problem) -> Problem:
    """q, k and v to the region's dtype, float64 left alone; what is added to logits stays as precise as it is."""
    dtype = torch.get_autocast_dtype(device)
    if p.q.dtype == torch.float64 or p.q.dtype == p.k.dtype == p.v.dtype == dtype:
        return p
    return p._replace(q=p.q.to(dtype), k=p.k.to(dtype), v=p.v.to(dtype), bias=_addable(p.bias, dtype))


def _addable(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return bias if bias is None or bias.dtype in (dtype, torch.float32) else bias.to(dtype)


def _autocast(key: str, device: str) -> Any:
    guarded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args: Any) -> Any:
        p = autocast(device, Problem(*args[:_COUNT]))
        with torch._C._ExcludeDispatchKeyGuard(guarded):
            return _attention(*p, *args[_COUNT:])

    return run


def _folds(p: Problem, dims: Sequence[Any]) -> bool:
    """The mapped dimension can join the batch: all that is mapped is per batch row, all else the same for all rows."""
    if p.dropout_p or p.cu_q is not None or p.key_lengths is not None or p.global_keys is not None:
        return False
    if any(d is not None for d in dims[3:]):
        return False
    return all(t is None or t.shape[0] == 1 for t in (p.bias, p.dense))


def _attention_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    V = info.batch_size
    if not _folds(Problem(*args[:_COUNT]), in_dims[:_TENSORS]):
        each = [[batching._pick(a, d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(V)]
        return batching._stack([_attention(*one) for one in each])
    q, k, v = (batching._fold(t, d, 0, V) for t, d in zip(args[:3], in_dims[:3], strict=True))
    out, lse = _attention(q, k, v, *args[3:])
    return (batching._unfold(out, 0, V), batching._unfold(lse, 0, V)), (1, 1)


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    V = info.batch_size
    p, needs = Problem(*args[2 : 2 + _COUNT]), args[-2]
    if any(needs[3:]) or not _folds(p, in_dims[2 : 2 + _TENSORS]):
        each = [[batching._pick(a, d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(V)]
        return batching._stack([_attention_backward(*one) for one in each])
    full = list(args)
    for i in (0, 1, 2, 3, 4, 2 + _COUNT, 3 + _COUNT):
        full[i] = batching._fold(args[i], in_dims[i], 0, V)
    grads = _attention_backward(*full)
    return (
        tuple(batching._unfold(g, 0, V) if need else g for g, need in zip(grads, needs, strict=True)),
        tuple(1 if need else None for need in needs),
    )


_lib.impl("attention", _attention_impl, "CompositeExplicitAutograd")
_lib.impl("attention_backward", _backward_impl, "CompositeExplicitAutograd")
_lib.impl("attention", _autocast("AutocastCPU", "cpu"), "AutocastCPU")
_lib.impl("attention", _autocast("AutocastCUDA", "cuda"), "AutocastCUDA")
torch.library.register_fake("fusedseq::attention", _attention_fake, lib=_lib)
torch.library.register_fake("fusedseq::attention_backward", _backward_fake, lib=_lib)
_lib.impl("attention", _attention_autograd, "Autograd", with_keyset=True)
_lib.impl("attention_backward", _backward_autograd, "Autograd", with_keyset=True)
torch.library.register_vmap("fusedseq::attention", _attention_vmap, lib=_lib)
torch.library.register_vmap("fusedseq::attention_backward", _backward_vmap, lib=_lib)
