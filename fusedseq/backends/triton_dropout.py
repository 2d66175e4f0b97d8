"""What a Triton kernel with dropout is given, besides what `fusedseq.kernels.philox` computes from it."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedseq.reference.attention import threshold


def dropout_arguments(
    dropout_p: float, seed: Tensor | None, device: torch.device
) -> tuple[Tensor | None, int, float]:  # seed [1], threshold, 1 / (1 - p)
    """The seed stays on the device, or goes there: reading it on the host would wait for the GPU. None: no dropout."""
    if not dropout_p or seed is None:
        return None, 0, 1.0
    scale = 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)
    return seed.to(device, torch.int64).reshape(1), threshold(dropout_p), scale
