"""The vector tanh and sigmoid of every ISA row against float64: at most 2 ulp anywhere, exact at the ends, NaN kept."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

_cpu = pytest.importorskip("fusedseq._cpu", reason="the compiled core is not built")

FUNCTIONS = {"sigmoid": (0, torch.sigmoid), "tanh": (1, torch.tanh)}
DTYPES = {torch.float32: 0, torch.float64: 1}


@pytest.fixture(params=_cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _cpu.apply_math(FUNCTIONS[name][0], DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), x.numel())
    return y


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Distance from the float64 truth in units of the float32 spacing at the truth, subnormals included."""
    spacing = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    return np.abs(got.astype(np.float64) - want) / spacing


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_two_ulp_over_the_whole_range(isa: str, name: str) -> None:
    # Every 1009th float32, from all bit patterns: both signs, subnormals, all exponents.
    bits = np.arange(0, 2**32, 1009, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    x = torch.from_numpy(x[np.isfinite(x)].copy())
    error = ulps(apply(name, x).numpy(), FUNCTIONS[name][1](x.double()).numpy())
    worst = int(error.argmax())
    assert error[worst] <= 2.0, f"{name}({x[worst].item()!r}) is {error[worst]:.2f} ulp off"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_agrees_with_torch(isa: str, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, dtype=torch.float64, generator=generator) * 10
    got, want = apply(name, x), FUNCTIONS[name][1](x)
    assert ((got - want).abs() <= 4 * torch.finfo(torch.float64).eps * want.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_zeros_and_nan(isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0], dtype=dtype)
    tanh, sigmoid = apply("tanh", x), apply("sigmoid", x)
    assert tanh[:2].tolist() == [1.0, -1.0] and sigmoid[:2].tolist() == [1.0, 0.0]
    assert tanh[2].isnan() and sigmoid[2].isnan()
    assert tanh[3:].tolist() == [0.0, 0.0] and torch.signbit(tanh[3:]).tolist() == [False, True]
    assert sigmoid[3:].tolist() == [0.5, 0.5]
