"""Which keys a query sees, said as structure rather than as a table of L x S."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fusedseq.ops.check import ArgumentTypeError, ArgumentValueError

Alignment = Literal["top-left", "bottom-right"]


class Mask:
    """The structure of attention. A query sees a key if every part that is given allows it.

    Queries are aligned with keys along a diagonal: query i of L stands at key i ("top-left", as in torch), or at key
    i + S - L ("bottom-right", so that the last query stands at the last key, as when decoding with a cache). S is then
    the key length of the batch row, or that of the packed sequence. Blocks of keys that no query of a block sees are
    never computed; a query that sees no key at all gives 0, lse = -inf and no gradient.

    Args:
        causal: "top-left" or "bottom-right": a query sees no key behind the diagonal. None: it may.
        window: (left, right): a query at key p sees keys p - left to p + right. None in a place, or -1: no bound on
            that side. A window without `causal` is aligned top-left.
        key_lengths: int [B], 0 to S: the keys of batch row b end there.
        cu_seqlens: int [N + 1], non-decreasing from 0: N sequences packed into one batch row (B = 1) begin and end
            there, and queries see the keys of their own sequence only. A pair (of queries, of keys) where they differ.
            Rows behind the last sequence see nothing. Excludes key_lengths.
        global_tokens: bool [S] or [B, S]: keys that are also seen from outside the window, as in Longformer (Beltagy et
            al. 2020, arXiv:2004.05150, section 3.1); causal, key_lengths and cu_seqlens hold for them as well.
        dense: bool, broadcastable to [B, Hq, L, S]: true takes part. Or floating: added to the logits, and
            differentiable; -inf takes no part.

    Raises:
        ArgumentTypeError, ArgumentValueError: here for what shows without the other tensors, else where it is used.
    """

    __slots__ = ("causal", "cu_seqlens", "dense", "global_tokens", "key_lengths", "window")

    def __init__(
        self,
        causal: Alignment | None = None,
        window: tuple[int | None, int | None] | None = None,
        *,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
        global_tokens: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        if causal not in (None, "top-left", "bottom-right"):
            raise ArgumentValueError(f'causal: expected "top-left", "bottom-right" or None, got {causal!r}')
        if window is not None:
            if not isinstance(window, (tuple, list)) or len(window) != 2:
                raise ArgumentValueError(f"window: expected a pair (left, right), got {window!r}")
            for side in window:
                if side is not None and (isinstance(side, bool) or side < -1):
                    raise ArgumentValueError(f"window: expected sizes of 0 or more, -1 or None, got {tuple(window)}")
        for name, t in (("key_lengths", key_lengths), ("global_tokens", global_tokens), ("dense", dense)):
            if t is not None and not isinstance(t, Tensor):
                raise ArgumentTypeError(f"{name}: expected a tensor or None, got {type(t).__name__}")
        if key_lengths is not None and cu_seqlens is not None:
            raise ArgumentValueError("key_lengths: expected None together with cu_seqlens, got a tensor")
        self.causal = causal
        self.window = window
        self.key_lengths = key_lengths
        self.cu_seqlens = cu_seqlens
        self.global_tokens = global_tokens
        self.dense = dense

    def __repr__(self) -> str:
        given = ((name, getattr(self, name)) for name in ("causal", "window", "key_lengths", "cu_seqlens",
                                                          "global_tokens", "dense"))  # fmt: skip
        shown = ((name, f"<{tuple(x.shape)}>" if isinstance(x, Tensor) else x) for name, x in given if x is not None)
        return f"Mask({', '.join(f'{name}={x!r}' if isinstance(x, str) else f'{name}={x}' for name, x in shown)})"
