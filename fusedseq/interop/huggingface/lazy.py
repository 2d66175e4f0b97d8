"""A mask that is structure to our attention, and a table of booleans to everybody else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedseq.ops import Mask
from fusedseq.ops import attention_check as check
from fusedseq.reference.attention import visible

_aten = torch.ops.aten
_KEPT = (_aten.detach.default, _aten.alias.default)
_ADDS = (_aten.add, _aten.add_, _aten.sub, _aten.sub_, _aten.rsub)


class AttentionMask(Tensor):
    """A bool [B, 1, L, S], true where a query sees a key, whose table exists only once an operator reads it.

    transformers takes masks for tensors, and hands those of four dimensions on untouched. What a model does to one
    (slices, combines, moves it) is done to the table, so `structure` never says something else than the table would.

    Raises:
        RuntimeError: the mask is added to numbers, as models do whose attention does not go through transformers'
            interface and therefore expects a mask of 0 and -inf; or it is written to.
    """

    structure: Mask | None  # None: `_table` alone says it
    _table: Tensor | None

    @staticmethod
    def __new__(
        cls, structure: Mask | None, shape: tuple[int, ...], device: torch.device, table: Tensor | None = None
    ) -> AttentionMask:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        made.structure, made._table = structure, table
        return made

    @classmethod
    def of(cls, table: Tensor) -> AttentionMask:  # bool [B, 1|H, L, S]
        return cls(None, tuple(table.shape), table.device, table)

    def mask(self) -> Mask:
        return self.structure if self.structure is not None else Mask(dense=self.table())

    def table(self) -> Tensor:  # bool, of this shape
        if self._table is None:
            B, _, L, S = self.shape
            q, k = (torch.empty((B, 1, n, 0), device=self.device) for n in (L, S))
            p = check.problem(q, k, k, self.structure, None, None, None, None, None, 0.0, None)
            check.shapes(p)
            p = check.data(p)
            seen = visible(p)
            self._table = (seen if p.dense is None else seen & p.dense).expand(self.shape)
        return self._table

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        said = self.structure if self.structure is not None else "a table"
        return f"AttentionMask({said}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        if func in _KEPT:
            given = args[0]
            return cls(given.structure, tuple(given.shape), given.device, given._table)
        if func.overloadpacket in _ADDS and any(isinstance(a, (float, Tensor)) and not _is_bool(a) for a in args[:2]):
            raise RuntimeError(  # Tensor's operators turn a TypeError into "unsupported operand" and drop the text
                "attention_mask: expected to be handed to the attention function, got an addition to numbers. This "
                'model computes attention by itself and cannot run with attn_implementation="fusedseq"; take "eager"'
            )
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, cls):
                raise RuntimeError(f"attention_mask: expected no write in place, got {func}; write to a clone")
        plain = torch.utils._pytree.tree_map_only(cls, cls.table, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        if type(result) is Tensor and result.dtype is torch.bool:
            view = any(r.alias_info is not None for r in func._schema.returns)
            # What still looks like a mask stays one, so that an addition is noticed behind a slice as well; so does a
            # view, through which the table could be made to say something else than the structure.
            if view or result.dim() == 4:
                return cls.of(result)
        return result


def _is_bool(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bool
