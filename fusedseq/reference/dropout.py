"""Dropout of the rows of a tensor, from Philox 4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedseq.reference.attention import _LOW, philox, threshold


def dropout_scale(shape: Sequence[int], dropout_p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies each element of [..., d] with: 0 or 1 / (1 - p).

    All dimensions but the last count as one, the rows. Element j of row r has word (j / 16) % 4 of philox(counter =
    (16 (j / 64) + j % 16, r mod 2^32, 0, r / 2^32), key = (seed mod 2^32, seed / 2^32)) and is dropped if that word is
    below `threshold`.
    """
    d = shape[-1]
    rows = int(torch.Size(shape[:-1]).numel())
    seed = seed.to(torch.int64).reshape(())
    device = seed.device
    blocks = (d + 63) // 64
    column = torch.arange(blocks * 16, device=device).expand(rows, -1)
    row = torch.arange(rows, device=device).unsqueeze(1).expand(-1, blocks * 16)
    words = philox((column, row & _LOW, torch.zeros_like(row), row >> 32), (seed & _LOW, (seed >> 32) & _LOW))
    word = torch.stack([w.unflatten(1, (blocks, 16)) for w in words], 2).flatten(1)[:, :d]
    factor = 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)
    return ((word >= threshold(dropout_p)).to(dtype) * factor).reshape(tuple(shape))
