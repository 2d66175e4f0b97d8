"""tanh and sigmoid of a device in float32, through the pointwise kernels, against float64. The emulator's exponential
and reciprocal are rounded ones, so that it measures the formulas; a GPU, where there is one, measures all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import cuda_emulated
import numpy as np
import pytest
import torch
from torch import Tensor

import fusedseq
from fusedseq.backends import cuda
from fusedseq.backends.cuda_cell import Step, pointwise_forward

DEVICE = "cuda" if cuda.missing() is None else "cpu"
ULPS = 8.0 if DEVICE == "cuda" else 4.0
SMALLEST = float(np.finfo(np.float32).tiny)
FUNCTIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    emulated = cuda.emulated(cuda_emulated.module()) if DEVICE == "cpu" else contextlib.nullcontext()
    with emulated, fusedseq.use_backend("cuda"), cuda_emulated.device(1):
        yield


def apply(name: str, x: Tensor) -> Tensor:  # [N] float32
    row = x.to(DEVICE).view(1, -1)
    if name == "tanh":
        return pointwise_forward(Step("rnn_tanh", row, None, None, None, None, None), None, x.dtype, False).h[0].cpu()
    step = Step("lstm", row.repeat(1, 4), None, None, None, None, None)
    kept = pointwise_forward(step, None, x.dtype, True).kept
    assert kept is not None
    gates = kept.view(5, -1)
    assert torch.equal(gates[0].view(torch.int32), gates[3].view(torch.int32))
    return gates[0].cpu()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_a_few_ulp_over_the_whole_range(name: str) -> None:
    # Every 30011th float32 of all bit patterns, and many from where neither function is flat.
    x = np.arange(0, 2**32, 30011, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = np.linspace(-20, 20, 150001, dtype=np.float32)
    x = np.concatenate([x[np.isfinite(x)], dense])
    want = FUNCTIONS[name](torch.from_numpy(x).double()).numpy()
    got = apply(name, torch.from_numpy(x)).double().numpy()
    spacing = np.spacing(np.maximum(np.abs(want), SMALLEST).astype(np.float32)).astype(np.float64)
    error = np.abs(got - want) / spacing
    if name == "sigmoid":  # what would be subnormal may be 0
        error[want < 2 * SMALLEST] = 0
        assert (got[want < 2 * SMALLEST] <= 2 * SMALLEST).all()
    worst = int(error.argmax())
    assert error[worst] <= ULPS, f"{name}({x[worst]!r}) is {error[worst]:.2f} ulp off"


def test_ends_zeros_and_nan() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    tanh, sigmoid = apply("tanh", x), apply("sigmoid", x)
    assert tanh[:2].tolist() == [1.0, -1.0] and sigmoid[:2].tolist() == [1.0, 0.0]
    assert torch.isnan(tanh[2]) and torch.isnan(sigmoid[2])
    assert sigmoid[3] == 0.5 and tanh[3] == 0
