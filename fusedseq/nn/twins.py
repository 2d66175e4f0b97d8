"""torch.nn's modules, ours, and how one instance passes from the class of the one to the class of the other.

The originals are looked up once, at import: a program may later put our classes in torch.nn's place, and what
calls "torch's own LSTM" must not find ours there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fusedseq import ops
from fusedseq.ops import Repeat

TorchRNNBase = torch.nn.RNNBase
TorchRNN = torch.nn.RNN
TorchLSTM = torch.nn.LSTM
TorchGRU = torch.nn.GRU
TorchRNNCellBase = torch.nn.RNNCellBase
TorchRNNCell = torch.nn.RNNCell
TorchLSTMCell = torch.nn.LSTMCell
TorchGRUCell = torch.nn.GRUCell
TorchMultiheadAttention = torch.nn.MultiheadAttention
TorchTransformer = torch.nn.Transformer
TorchTransformerEncoder = torch.nn.TransformerEncoder
TorchTransformerEncoderLayer = torch.nn.TransformerEncoderLayer
TorchTransformerDecoder = torch.nn.TransformerDecoder
TorchTransformerDecoderLayer = torch.nn.TransformerDecoderLayer

is_grad_enabled = torch.is_grad_enabled

#: torch's class -> ours; filled by the files that define ours.
FUSED: dict[type, type] = {}


#: Kinds of steps that a module counts.
_KINDS = 16


class Fused:
    """What each of our modules adds to its torch.nn namesake for the sake of passing to and fro."""

    # The step that the module is asked for again and again, once there is one; the same where autograd records, from a
    # state that does or does not require a gradient; and how often steps of each kind took the long way.
    _repeat: Repeat | None = None
    _recorded: dict[bool, Repeat | None] | None = None
    _asked: dict[Any, int] | None = None

    def _again(
        self, cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """y, h_n and c_n by the short way, or None if this step must take the long one."""
        ready = self._repeat
        if is_grad_enabled():
            ready = None if self._recorded is None else self._recorded.get(h0.requires_grad)
        return None if ready is None else ready(cell, x, h0, c0, weights)

    def _expect(
        self, cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], y: Tensor | None,
        layers: int = 1, bidirectional: bool = False,
    ) -> None:  # fmt: skip
        """After a step: be ready for the next one, if this was not the first of its kind."""
        recorded = h0 is not None and is_grad_enabled() and h0.requires_grad
        kind = (cell, x.shape, x.dtype, is_grad_enabled(), recorded)
        asked = self._asked
        if asked is None or len(asked) > _KINDS:
            asked = self.__dict__["_asked"] = {}
        times = asked[kind] = asked.get(kind, 0) + 1
        if times > 1 and not times & (times - 1):  # ever more seldom, where it turns out that nothing can be prepared
            ready = ops.prepare(cell, x, h0, c0, weights, y, layers, bidirectional)
            if ready is not None and is_grad_enabled():
                self.__dict__["_recorded"] = {**(self._recorded or {}), recorded: ready}
            elif ready is not None:
                self.__dict__["_repeat"] = ready

    def beyond_torch(self) -> str | None:
        """The option in use that torch.nn lacks, or None if the namesake computes the same."""
        return None

    def __prepare_scriptable__(self) -> torch.nn.Module:
        # TorchScript cannot compile a forward with keyword-only arguments, and its archives must load where this
        # package is not installed: what it gets is torch's own module. Sharing the dictionaries, not only the
        # parameters in them, keeps the two one under .to(), load_state_dict and hooks.
        option = self.beyond_torch()
        if option is not None:
            raise RuntimeError(
                f"{type(self).__name__} with {option} has no counterpart in torch.nn and cannot be scripted"
            )
        stock = stock_class(type(self))
        if stock is None:
            raise RuntimeError(
                f"{type(self).__qualname__} is a subclass of fusedseq.{base_name(type(self))} and cannot be scripted"
            )
        twin: torch.nn.Module = object.__new__(stock)
        twin.__dict__.update(self.__dict__)
        settle(twin)
        return twin


def base_name(cls: type) -> str:
    """The name of the torch.nn module that `cls` is, or descends from."""
    for base in cls.__mro__:
        if base in FUSED:
            return base.__name__
    raise TypeError(f"{cls.__qualname__} descends from none of {sorted(c.__name__ for c in FUSED)}")


def _is_parametrized_class(cls: type) -> bool:
    # register_parametrization gives the instance a class of its own, derived from the one it had.
    return len(cls.__bases__) == 1 and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"


def _rebased(cls: type, table: dict[type, type]) -> type | None:
    if cls in table:
        return table[cls]
    if _is_parametrized_class(cls) and cls.__bases__[0] in table:
        base = table[cls.__bases__[0]]
        members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
        return type(f"Parametrized{base.__name__}", (base,), members)
    return None


def fused_class(cls: type) -> type | None:
    """Our class for a module of exactly this torch.nn class (parametrized or not); None for any other class."""
    return _rebased(cls, FUSED)


def stock_class(cls: type) -> type | None:
    """torch.nn's class for a module of exactly this class of ours; None for any other class."""
    return _rebased(cls, {ours: stock for stock, ours in FUSED.items()})


def plain_class(module: torch.nn.Module) -> type:
    """The class of `module` before any parametrization was registered on it."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) and _is_parametrized_class(cls) else cls


def settle(module: torch.nn.Module) -> None:
    """Bring what a module keeps beside its parameters in line with its class."""
    if not isinstance(module, Fused):
        for name in ("_repeat", "_recorded", "_asked", "_frozen"):
            module.__dict__.pop(name, None)
    if not isinstance(module, TorchRNNBase):
        return
    if isinstance(module, Fused):
        # Ours is computed on demand; a copy left behind would only keep replaced weights alive.
        module.__dict__.pop("_flat_weights", None)
    else:
        stock: Any = module
        stock._init_flat_weights()
