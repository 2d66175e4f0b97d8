"""What stands around the products of a Transformer's layer, computed in one pass where nobody can tell.

A layer of torch.nn calls modules one by one, and a program may have replaced, hooked, parametrized or overridden any
of them, or may be watching operators. Each test here asks whether the parts in question are still torch.nn's own; where
they are not, they are called as torch.nn calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as registration

from fusedseq import ops
from fusedseq.ops.bias_activation import overwrite
from fusedseq.ops.check import DTYPES
from fusedseq.ops.linear import linear
from fusedseq.ops.rows import is_ordinary

_is_autocasting = torch._C._is_any_autocast_enabled
_PARAMETERS = (Tensor, torch.nn.Parameter)
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
# Classes and their forward as they were at import: neither a subclass nor a patched class is one of these.
_OWN: dict[Any, Any] = {
    cls: cls.forward
    for cls in (torch.nn.Dropout, torch.nn.LayerNorm, torch.nn.Linear, torch.nn.ReLU, torch.nn.GELU, torch.nn.SiLU)
}
_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


def is_watched(x: Tensor) -> bool:
    """Somebody transforms, casts, traces or intercepts what is computed from x, or it is no tensor of ours."""
    return not (is_ordinary((x,)) and x.is_cpu and x.dtype in DTYPES) or _is_autocasting()


def is_own(part: Any, cls: Any) -> bool:
    """A module of exactly this class of torch.nn: calling it does what the class does and nothing else."""
    if type(part) is not cls or cls.forward is not _OWN[cls] or "forward" in part.__dict__:
        return False
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return False
    return not any(getattr(registration, name) for name in _GLOBAL_HOOKS)


def _fits(x: Tensor, *parameters: Tensor | None) -> bool:
    return all(t is None or (type(t) in _PARAMETERS and t.dtype is x.dtype and t.is_cpu) for t in parameters)


def _is_dropout(part: Any) -> bool:
    return is_own(part, torch.nn.Dropout) and not part.inplace and 0 <= part.p <= 1


def _rate(dropout: Any) -> float:
    return float(dropout.p) if dropout.training else 0.0


def inherits(layer: torch.nn.Module, name: str, cls: Any) -> bool:
    """Whether the layer's method is still that of torch.nn's class."""
    return name not in layer.__dict__ and getattr(type(layer), name) is getattr(cls, name)


def joins(x: Tensor, dropout: Any, norm: Any) -> bool:
    """Whether `join` may take the place of these two modules, for a layer whose input is x."""
    return (
        _is_dropout(dropout)
        and is_own(norm, torch.nn.LayerNorm)
        and tuple(norm.normalized_shape) == tuple(x.shape[-1:])
        and _fits(x, norm.weight, norm.bias)
    )


def join(y: Tensor, x: Tensor, dropout: Any, norm: Any) -> Tensor:
    """norm(x + dropout(y))."""
    return ops.residual_dropout_layer_norm(y, x, norm.weight, norm.bias, norm.eps, dropout_p=_rate(dropout))


def join_and_keep(y: Tensor, x: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """norm(s) and s = x + dropout(y)."""
    return ops.residual_dropout_layer_norm(
        y, x, norm.weight, norm.bias, norm.eps, dropout_p=_rate(dropout), return_sum=True
    )


def add(y: Tensor, x: Tensor, dropout: Any) -> Tensor:
    """x + dropout(y)."""
    rate = _rate(dropout)
    return ops.bias_activation_dropout(y, residual=x, dropout_p=rate) if rate else x + y


def _activation(part: Any) -> str | None:
    """The name of an activation that the fused operator has."""
    if not isinstance(part, torch.nn.Module):
        return next((name for function, name in _FUNCTIONS.items() if function is part), None)
    if is_own(part, torch.nn.ReLU):
        return "relu"
    if is_own(part, torch.nn.GELU):
        approximate: Any = part.approximate
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return "silu" if is_own(part, torch.nn.SiLU) else None


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x))))."""
    first = layer.linear1
    name = _activation(layer.activation)
    if name is None or not (is_own(first, torch.nn.Linear) and _is_dropout(layer.dropout)):
        return layer.linear2(layer.dropout(layer.activation(first(x))))
    if not _fits(x, first.weight, first.bias) or first.weight.shape[-1] != x.shape[-1]:
        return layer.linear2(layer.dropout(layer.activation(first(x))))
    hidden = overwrite(linear(x, first.weight), first.bias, name, _rate(layer.dropout))
    second = layer.linear2
    if is_own(second, torch.nn.Linear):
        return linear(hidden, second.weight, second.bias)
    return second(hidden)


class Sublayers:
    """The residual stream x of one call of a layer, and what each of its parts adds to it."""

    def __init__(self, layer: Any, cls: Any, x: Tensor) -> None:
        self.layer, self.cls, self.x = layer, cls, x
        self.watched = is_watched(x)

    def _may(self, name: str) -> bool:
        return not self.watched and inherits(self.layer, name, self.cls)

    def post(
        self, name: str, dropout: Any, norm: Any, inner: Callable[[], Tensor], whole: Callable[[], Tensor]
    ) -> None:
        """x = norm(x + block), the block being `inner` before its dropout and `whole` with it."""
        if self._may(name) and joins(self.x, dropout, norm):
            self.x = join(inner(), self.x, dropout, norm)
        else:
            self.x = norm(self.x + whole())

    def pre(
        self, name: str, dropout: Any, norm: Any, inner: Callable[[], Tensor], whole: Callable[[], Tensor]
    ) -> Tensor:
        """x = x + block; returns norm(x), with which the next block begins."""
        if self._may(name) and joins(self.x, dropout, norm):
            normed, self.x = join_and_keep(inner(), self.x, dropout, norm)
            return normed
        self.x = self.x + whole()
        return norm(self.x)

    def last(self, name: str, dropout: Any, inner: Callable[[], Tensor], whole: Callable[[], Tensor]) -> None:
        """x = x + block."""
        if self._may(name) and _is_dropout(dropout):
            self.x = add(inner(), self.x, dropout)
        else:
            self.x = self.x + whole()
