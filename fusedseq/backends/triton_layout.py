"""How the rows of a scan's input lie on the grid of times and batch entries, as the Triton kernels are told."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Row (t, b) is `t strides[0] + b strides[1]`, packed `starts[t] + b`; it exists for t < lengths[b]."""

    T: int
    B: int
    N: int  # rows
    strides: tuple[int, int]
    lengths: Tensor | None  # [B] int64
    starts: Tensor | None  # [T] int64, packed rows only
    resets: Tensor | None  # [N] uint8

    @staticmethod
    def of(
        x: Tensor,
        batch_first: bool,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        batch: int | None,  # what the states say
    ) -> Layout:
        if resets is not None:
            resets = resets.contiguous().view(torch.uint8).reshape(-1)
        if batch_sizes is not None:
            T, N = len(batch_sizes), x.shape[0]
            B = batch if batch is not None else int(batch_sizes[0]) if T else 0
            starts = (batch_sizes.cumsum(0) - batch_sizes).to(x.device)
            ends = (batch_sizes.unsqueeze(1) > torch.arange(B)).sum(0).to(x.device)
            return Layout(T, B, N, (0, 0), ends, starts, resets)
        T, B = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
        strides = (1, T) if batch_first else (B, 1)
        return Layout(T, B, T * B, strides, None if lengths is None else lengths.to(x.device), None, resets)

    def data(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.lengths, self.starts, self.resets

    def _grid(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Time and batch entry of every row, [N] each."""
        row = torch.arange(self.N, device=device)
        if self.starts is not None:
            t = torch.searchsorted(self.starts, row, right=True) - 1
            return t, row - self.starts[t]
        return (row % self.T, row // self.T) if self.strides[0] == 1 else (row // self.B, row % self.B)

    def clear(self, rows: Tensor) -> Tensor:  # [N, ...]
        """Zeros in rows beyond a length; packed rows all exist."""
        if self.lengths is None or self.starts is not None:
            return rows
        t, b = self._grid(rows.device)
        return rows.masked_fill((t >= self.lengths[b]).unsqueeze(1), 0.0)

    def states_before(self, y: Tensor, h0: Tensor | None, D: int) -> Tensor:  # y [N, D R] -> [D, N, R]
        """The state that entered each step, zero where it was reset and in rows that do not exist."""
        N, B, R = self.N, self.B, y.shape[1] // D
        t, b = self._grid(y.device)
        states = []
        for d in range(D):
            before = t - 1 if d == 0 else t + 1
            last = self.T if self.lengths is None else self.lengths[b]
            inside = (before >= 0) & (before < last)
            at = before.clamp(0, self.T - 1)
            row = (at * self.strides[0] + b * self.strides[1]) if self.starts is None else self.starts[at] + b
            first = y.new_zeros((B, R)) if h0 is None else h0[d]
            source = torch.cat([y[:, d * R : (d + 1) * R], first])
            state = source.index_select(0, torch.where(inside, row, N + b))
            if self.resets is not None:
                state.masked_fill_(self.resets.bool().unsqueeze(1), 0.0)
            states.append(self.clear(state))
        return torch.stack(states)
