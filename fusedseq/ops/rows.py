"""What an operator that works row by row needs to be known to torch: one class for layer_norm and bias_activation.

An operator takes the fields of its `Problem` in order, tensors first, and the name of a backend, "" leaving the choice
to the registry; it returns tensors, of shape [0] where one does not apply. As for attention, ordinary eager calls go
straight to the backend, autograd is written out so that torch.func may differentiate and map the operators, and second
derivatives and forward mode go through the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fusedseq import registry
from fusedseq.backends import reference
from fusedseq.ops import batching
from fusedseq.ops.check import DTYPES, _bad_type, _bad_value, _shape
from fusedseq.ops.derivative import _below, _dual, is_watched
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

Outputs = tuple[Tensor | None, ...]
_lib = torch.library.Library("fusedseq", "FRAGMENT")


def is_ordinary(tensors: Sequence[Tensor | None]) -> bool:
    """Nothing transforms, traces or intercepts operators, and the tensors are what they seem, with data behind them."""
    if _is_compiling() or _interpreters() is not None or _dispatch_modes() or _function_modes():
        return False
    if _tracing_state() is not None or forward_ad._current_level >= 0:
        return False
    return all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)


def check_rows(p: Any, like: Sequence[str], vectors: Sequence[str]) -> None:
    """x is [..., d]; what is named in `like` has its shape, what is named in `vectors` is [d]; p is a Problem."""
    x = p.x
    if not isinstance(x, Tensor):
        _bad_type("x", "a tensor", type(x).__name__)
    if x.dim() < 1:
        _bad_value("x", "at least one dimension [..., d]", _shape(x.shape))
    if x.dtype not in DTYPES:
        _bad_type("x", "dtype float32, float64, bfloat16 or float16", x.dtype)
    for name in (*like, *vectors):
        t = getattr(p, name)
        if t is None:
            continue
        if not isinstance(t, Tensor):
            _bad_type(name, "a tensor or None", type(t).__name__)
        shape = x.shape if name in like else x.shape[-1:]
        if t.shape != shape:
            _bad_value(name, f"shape {_shape(shape)}", _shape(t.shape))
        if t.dtype is not x.dtype:
            _bad_type(name, f"dtype {x.dtype}, that of x", t.dtype)
        if t.device != x.device:
            _bad_type(name, f"device {x.device}, that of x", t.device)
    if not 0 <= p.dropout_p <= 1:
        _bad_value("dropout_p", "a probability between 0 and 1", p.dropout_p)
    if p.dropout_p and (p.seed is None or p.seed.numel() != 1):
        _bad_value("seed", "one integer together with dropout_p", p.seed)


def seed_for(x: Tensor, dropout_p: float, seed: int | Tensor | None) -> Tensor | None:
    """The seed of a call's dropout, drawn from torch's generator if none is given."""
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), device=x.device)
    return seed if isinstance(seed, Tensor) else torch.tensor(seed, dtype=torch.int64, device=x.device)


class RowOperator:
    """`fusedseq::<name>` and `fusedseq::<name>_backward`, and the way past them for ordinary calls.

    Args:
        name: of the operator; backends have `<name>_forward(p)` and `<name>_backward(p, upstream, needs)`.
        problem: the NamedTuple of arguments.
        schema: its fields as torch.library writes them.
        tensors: how many fields are tensors; they come first, the seed last.
        differentiable: how many of them can have a gradient.
        outputs: for a problem, whether each output applies.
        check: raises for what a caller got wrong.
        backward: the specification's, called with a problem and the upstream gradients.
    """

    def __init__(
        self, name: str, problem: Any, schema: str, tensors: int, differentiable: int,
        outputs: Callable[[Any], tuple[bool, ...]], results: str, check: Callable[[Any], None],
        backward: Callable[..., Outputs],
    ) -> None:  # fmt: skip
        self.name, self.problem, self.tensors, self.differentiable = name, problem, tensors, differentiable
        self.outputs, self.check, self.specification = outputs, check, backward
        self.count = len(problem._fields)
        self.upstream = results.count("Tensor")
        grads = ", ".join(f"Tensor d{field}" for field in problem._fields[:differentiable])
        upstream = "".join(f"Tensor? d{i}, " for i in range(self.upstream))
        tags = (torch.Tag.pt2_compliant_tag,)
        _lib.define(f"{name}({schema}, str backend) -> ({results})", tags=tags)
        _lib.define(f"{name}_backward({upstream}{schema}, bool[] needs, str backend) -> ({grads})", tags=tags)
        self.op: Any = getattr(torch.ops.fusedseq, name).default
        self.backward_op: Any = getattr(torch.ops.fusedseq, f"{name}_backward").default
        back = f"{name}_backward"
        _lib.impl(name, self._impl, "CompositeExplicitAutograd")
        _lib.impl(back, self._backward_impl, "CompositeExplicitAutograd")
        for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
            _lib.impl(name, self._autocast_kernel(key, device), key)
        torch.library.register_fake(f"fusedseq::{name}", self._fake, lib=_lib)
        torch.library.register_fake(f"fusedseq::{back}", self._backward_fake, lib=_lib)
        _lib.impl(name, self._autograd, "Autograd", with_keyset=True)
        _lib.impl(back, self._backward_autograd, "Autograd", with_keyset=True)
        torch.library.register_vmap(f"fusedseq::{name}", self._vmap, lib=_lib)
        torch.library.register_vmap(f"fusedseq::{back}", self._backward_vmap, lib=_lib)

    def run(self, p: Any) -> Outputs:
        """The outputs of a problem that has not been checked yet, None where one does not apply."""
        tensors = p[: self.tensors]
        if not is_ordinary(tensors):
            if not all(t is None or isinstance(t, Tensor) for t in tensors):
                self.check(p)  # torch's own words would not name the argument
            outputs = _tuple(self.op(*p, registry.forced()))
            return tuple(t if there else None for t, there in zip(outputs, self.outputs(p), strict=True))
        if is_autocasting() and torch.is_autocast_enabled(p.x.device.type):
            p = self.autocast(p)
            tensors = p[: self.tensors]
        self.check(p)
        backend = self.choose(p, None)
        if _is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return Rows.apply(self, backend, p[self.tensors :], *tensors)
        return getattr(backend, f"{self.name}_forward")(p)

    def choose(self, p: Any, name: str | None) -> ModuleType:
        return registry.choose(registry.row_call(self.name, p), name)

    def needed(self, tensors: Sequence[Tensor | None], flags: Sequence[bool]) -> list[bool]:
        return [flag and t is not None for t, flag in zip(tensors, flags, strict=False)][: self.differentiable]

    def call_backward(
        self, p: Any, upstream: Sequence[Tensor | None], needs: Sequence[bool], backend: str
    ) -> list[Tensor | None]:
        """The operator, with None for what is not needed."""
        grads = self.backward_op(*upstream, *p, list(needs), backend)
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    def autocast(self, p: Any) -> Any:
        """All tensors in the widest dtype among x and what is added to it; others follow."""
        dtype, residual = p.x.dtype, p.residual
        if residual is not None:
            dtype = torch.promote_types(dtype, residual.dtype)
        cast = (t if t is None or t.dtype is dtype else t.to(dtype) for t in p[: self.differentiable])
        return self.problem(*cast, *p[self.differentiable :])

    def _impl(self, *args: Any) -> Any:
        p = self.problem(*args[:-1])
        self.check(p)
        outputs = getattr(self.choose(p, args[-1]), f"{self.name}_forward")(p)
        return self._results(p.x.new_empty(0) if t is None else t.contiguous() for t in outputs)

    def _results(self, outputs: Iterable[Tensor]) -> Any:
        """As torch.library wants them: a lone result is no tuple."""
        results = tuple(outputs)
        return results if len(results) > 1 else results[0]

    def _fake(self, *args: Any) -> Any:
        p = self.problem(*args[:-1])
        self.check(p)
        return self._results(p.x.new_empty(p.x.shape if there else 0) for there in self.outputs(p))

    def _backward_impl(self, *args: Any) -> tuple[Tensor, ...]:
        upstream, p = args[: self.upstream], self.problem(*args[self.upstream : -2])
        needs, backend = args[-2:]
        self.check(p)
        likes = self._gradients_like(p, needs)
        if all(t is None for t in upstream):
            return tuple(t.zero_() for t in likes)
        grads = getattr(self.choose(p, backend), f"{self.name}_backward")(p, upstream, needs)
        given = [t.data_ptr() for t in upstream if t is not None]
        result = []
        for g, like in zip(grads, likes, strict=True):
            if g is None:
                result.append(like)
                continue
            shared = g.numel() and g.data_ptr() in given  # an operator's results share no memory
            g = g.clone(memory_format=torch.contiguous_format) if shared else g.contiguous()
            given.append(g.data_ptr())
            result.append(g)
        return tuple(result)

    def _gradients_like(self, p: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return tuple(
            p.x.new_empty(t.shape if need and t is not None else 0) for t, need in zip(p, needs, strict=False)
        )  # fmt: skip

    def _backward_fake(self, *args: Any) -> tuple[Tensor, ...]:
        return self._gradients_like(self.problem(*args[self.upstream : -2]), args[-2])

    def _autograd(self, keys: Any, *args: Any) -> Any:
        if _dual(args):
            p = self.problem(*args[:-1])
            outputs = getattr(self.choose(p, reference.name), f"{self.name}_forward")(p)
            return self._results(p.x.new_empty(0) if t is None else t for t in outputs)
        if _differentiates(args):
            with enable_single_level_autograd_function():
                return self._results(_Forward.apply(self, keys, args[self.tensors :], *args[: self.tensors]))
        return _below(self.op, keys, args)

    def _backward_autograd(self, keys: Any, *args: Any) -> Any:
        if _dual(args):
            upstream, p = args[: self.upstream], self.problem(*args[self.upstream : -2])
            grads = self.specification(p, *upstream)
            return tuple(
                g if need and g is not None else p.x.new_empty(0) for g, need in zip(grads, args[-2], strict=True)
            )
        if _differentiates(args):
            split = self.upstream + self.tensors
            with enable_single_level_autograd_function():
                return _Backward.apply(self, keys, args[split:], *args[:split])
        return _below(self.backward_op, keys, args)

    def _autocast_kernel(self, key: str, device: str) -> Any:
        guarded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(*args: Any) -> Any:
            p = self.autocast(self.problem(*args[:-1]))
            with torch._C._ExcludeDispatchKeyGuard(guarded):
                return self.op(*p, args[-1])

        return run

    def _folds(self, p: Any, dims: Sequence[Any]) -> bool:
        """The mapped dimension is one more dimension of rows: all that is mapped is x or has its shape."""
        return not p.dropout_p and all(d is None or t is p.x or t is p.residual for t, d in zip(p, dims, strict=False))

    def _lead(self, p: Any, dims: Sequence[Any], V: int) -> Any:
        lead = {
            name: _to_front(getattr(p, name), dims[p._fields.index(name)], V)
            for name in ("x", "residual") if getattr(p, name) is not None
        }  # fmt: skip
        return p._replace(**lead)

    def _vmap(self, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        V, p = info.batch_size, self.problem(*args[:-1])
        if not self._folds(p, in_dims[: self.tensors]):
            return _each(self.op, in_dims, args, V)
        outputs = self.op(*self._lead(p, in_dims, V), args[-1])
        dims = tuple(0 if there else None for there in self.outputs(p))
        return outputs, dims if len(dims) > 1 else dims[0]

    def _backward_vmap(self, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        V, n = info.batch_size, self.upstream
        p, needs = self.problem(*args[n:-2]), args[-2]
        whole = [p._fields[i] in ("x", "residual") for i in range(self.differentiable)]
        sums = any(need and not full for need, full in zip(needs, whole, strict=True))
        if sums or not self._folds(p, in_dims[n : n + self.tensors]):
            return _each(self.backward_op, in_dims, args, V)
        upstream = [_to_front(t, d, V) for t, d in zip(args[:n], in_dims[:n], strict=True)]
        grads = self.backward_op(*upstream, *self._lead(p, in_dims[n:], V), needs, args[-1])
        return tuple(grads), tuple(0 if need else None for need in needs)


def _to_front(t: Tensor | None, dim: int | None, V: int) -> Tensor | None:
    if t is None:
        return None
    return t.expand(V, *t.shape) if dim is None else t.movedim(dim, 0)


def _each(op: Any, in_dims: Any, args: Any, V: int) -> tuple[Any, Any]:
    """One example after the other."""
    each = [[batching._pick(a, d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(V)]
    outputs, dims = batching._stack([_tuple(op(*one)) for one in each])
    return (outputs, dims) if len(outputs) > 1 else (outputs[0], dims[0])


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _differentiates(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


class Rows(torch.autograd.Function):
    """The lean autograd path: one call, run by a backend that has been chosen."""

    apply: Any

    @staticmethod
    def forward(
        ctx: Any, op: RowOperator, backend: ModuleType, numbers: tuple[Any, ...], *tensors: Tensor | None
    ) -> Outputs:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.op, ctx.backend, ctx.numbers = op, backend, numbers
        return getattr(backend, f"{op.name}_forward")(op.problem(*tensors, *numbers))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        op, tensors = ctx.op, ctx.saved_tensors
        if all(t is None for t in upstream):
            return (None,) * (3 + op.tensors)
        p = op.problem(*tensors, *ctx.numbers)
        needs = op.needed(tensors, ctx.needs_input_grad[3:])
        if is_watched(*upstream):
            grads = op.call_backward(p, upstream, needs, ctx.backend.name)
        else:
            grads = getattr(ctx.backend, f"{op.name}_backward")(p, upstream, needs)
        return (None, None, None, *grads, *(None,) * (op.tensors - op.differentiable))


class _Forward(_SingleLevelFunction):
    apply: Any

    @staticmethod
    def forward(ctx: Any, op: RowOperator, keys: Any, numbers: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        outputs = _tuple(_below(op.op, keys, (*tensors, *numbers)))
        ctx.set_materialize_grads(False)
        there = op.outputs(op.problem(*tensors, *numbers[:-1]))
        ctx.mark_non_differentiable(*(t for t, is_there in zip(outputs, there, strict=True) if not is_there))
        ctx.save_for_backward(*tensors)
        ctx.op, ctx.numbers, ctx.there = op, numbers, there
        return outputs

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        op, tensors = ctx.op, ctx.saved_tensors
        upstream = [t if is_there else None for t, is_there in zip(given, ctx.there, strict=True)]
        if all(t is None for t in upstream):
            return (None,) * (3 + op.tensors)
        *numbers, backend = ctx.numbers
        needs = op.needed(tensors, ctx.needs_input_grad[3:])
        grads = op.call_backward(op.problem(*tensors, *numbers), upstream, needs, backend)
        return (None, None, None, *grads, *(None,) * (op.tensors - op.differentiable))


class _Backward(_SingleLevelFunction):
    apply: Any

    @staticmethod
    def forward(ctx: Any, op: RowOperator, keys: Any, rest: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        grads = _below(op.backward_op, keys, (*tensors, *rest))
        *numbers, needs, _ = rest
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(g for g, need in zip(grads, needs, strict=True) if not need))
        ctx.save_for_backward(*tensors)
        ctx.op, ctx.numbers, ctx.needs = op, numbers, needs
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Double backward, through the specification's own backward."""
        op, tensors = ctx.op, ctx.saved_tensors
        movable = [i for i in range(op.upstream + op.differentiable) if tensors[i] is not None]
        wanted = [i for i, g in enumerate(cotangents) if g is not None and ctx.needs[i]]
        result: list[Any] = [None] * len(tensors)

        def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = list(tensors)
            for i, t in zip(movable, primals, strict=True):
                full[i] = t
            grads = op.specification(op.problem(*full[op.upstream :], *ctx.numbers), *full[: op.upstream])
            return tuple(g for i in wanted if (g := grads[i]) is not None)

        if wanted:
            pull: Any = torch.func.vjp(gradients, *(tensors[i] for i in movable))[1]
            for i, g in zip(movable, pull(tuple(cotangents[i] for i in wanted)), strict=True):
                result[i] = g
        return (None, None, None, *result)
