"""A cell as a scan of one step, for backends that have no kernel of its own for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def _lead(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.unsqueeze(0)


def cells(scan_forward: Callable[..., Any], scan_backward: Callable[..., Any]) -> tuple[Any, Any]:
    """A backend's `cell_forward` and `cell_backward`, made of its scans; tensors of one step have no time dimension."""

    def cell_forward(
        cell: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], save: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        _, h_n, c_n, _, reserve = scan_forward(
            cell, x.unsqueeze(0), _lead(h), _lead(c), weights, False, False, None, None, None, False, save
        )
        return h_n.squeeze(0), None if c_n is None else c_n.squeeze(0), reserve

    def cell_backward(
        cell: str,
        dh: Tensor | None,
        dc: Tensor | None,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        weights: Sequence[Tensor],
        h_new: Tensor,
        reserve: Tensor,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
        dx, dh0, dc0, dweights = scan_backward(
            cell, None, _lead(dh), _lead(dc), None, x.unsqueeze(0), _lead(h), _lead(c), weights, False, False,
            None, None, None, h_new.unsqueeze(0), reserve, need_dx, need_dw,
        )  # fmt: skip
        return None if dx is None else dx.squeeze(0), dh0.squeeze(0), None if dc0 is None else dc0.squeeze(0), dweights

    return cell_forward, cell_backward
