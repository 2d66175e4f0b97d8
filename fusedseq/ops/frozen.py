"""Weights kept as the kernels read them, for modules whose weights stand still."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor


class Frozen:
    """The packed weights of one layer, packed again when a weight is another one or was written to.

    Writing is noticed by the version that autograd keeps of every tensor. What goes around it (`weight.data`, numpy,
    another process) is not noticed, which is why a module must be frozen by its owner.
    """

    __slots__ = ("_key", "_packed")

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._packed: Any = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy packs its own.
        return Frozen, ()

    def packed(self, backend: ModuleType, cell: str, weights: Sequence[Tensor], bidirectional: bool) -> Any:
        """What `backend` made of these weights; None if it keeps nothing."""
        pack = getattr(backend, "pack", None)
        if pack is None or any(w.is_inference() for w in weights):  # these have no version
            return None
        tensors = tuple((w.data_ptr(), w._version, w.shape, w.dtype) for w in weights)
        key = (backend.name, cell, bidirectional, tensors)
        if key != self._key:
            self._packed, self._key = pack(cell, weights, bidirectional), key
        return self._packed
