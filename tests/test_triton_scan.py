"""What the parity matrix leaves of the Triton scans: each kernel whatever the size, gates formed again, the math."""

from __future__ import annotations

import functools

import pytest
import torch

import fusedseq
from fusedseq import registry
from fusedseq.ops import scan
from fusedseq.testing import DTYPES, Case, check
from fusedseq.testing.cases import CELLS, short

if (reason := registry.backends()["triton"].missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from fusedseq.kernels import activation, cells, scan_plan
from fusedseq.kernels.runtime import INTERPRETING
from fusedseq.reference import bias_activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The plan would run these resident; between them every layout, resets, and more units than a tile has.
MOVED = ("T3B2I4H37-bi-packed-resets-cells", "T3B18I3H16-bi-lengths0-cells-nostate-sliced", "T2B3I2H9-bf-nobias-resets")


@pytest.fixture(params=["streamed", "step"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(scan_plan, "RESIDENT", dict.fromkeys(scan_plan.RESIDENT, 0))
    if request.param == "step":
        monkeypatch.setattr(scan_plan, "STREAMED", 0)
    return request.param


@pytest.mark.parametrize("text", MOVED)
@pytest.mark.parametrize("cell", CELLS)
def test_every_kernel_whatever_the_size(kind: str, cell: str, text: str) -> None:
    case = Case.parse(cell, text)
    assert scan_plan.plan(cell, case.H, case.R, case.B, case.D, torch.float32).kind == kind
    with fusedseq.use_backend("triton"):
        check(scan, case, torch.float32, DEVICE)


@pytest.mark.parametrize("text", ["T3B3I5H33-bi-proj7-lengths0-resets-cells", "T3B5I2H12-packed-proj20-nobias-resets"])
def test_projection_step_by_step(kind: str, text: str) -> None:
    with fusedseq.use_backend("triton"):
        check(scan, Case.parse("lstm", text), torch.float32, DEVICE)


def test_half_types_whatever_the_size(kind: str) -> None:
    with fusedseq.use_backend("triton"):
        for cell in ("lstm", "gru_reset_before"):
            check(scan, Case.parse(cell, "T2B2I4H33-bi-lengths-resets"), torch.bfloat16, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("cell", CELLS)
def test_gates_formed_again(cell: str, dtype: torch.dtype) -> None:
    again = functools.partial(scan, recompute=True)
    with fusedseq.use_backend("triton"):
        for text in ("T3B4I5H9-bi-lengths0-resets-cells", "T4B3I2H7-packed-nobias"):
            check(again, Case.parse(cell, text), dtype, DEVICE)


def test_reasons() -> None:
    module = registry.backends()["triton"]
    call = registry.ScanCall("lstm", DEVICE, torch.float32, 3, 2, 4, 5, 5, 1, False, False, False, False, True)
    assert module.supports(call) is None
    assert module.supports(call._replace(dtype=torch.float64)) == "it has no kernel for torch.float64"
    assert "on meta" in module.supports(call._replace(device="meta"))
    long = module.supports(call._replace(T=100_000))
    assert (long is not None and "minutes" in long) if INTERPRETING else long is None
    with pytest.raises(registry.BackendError, match="'triton' was asked for by name but refuses"):
        registry.choose(call._replace(dtype=torch.float64), "triton")


def test_reasons_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = registry.backends()["triton"].missing.__wrapped__  # past the cache
    monkeypatch.setattr(fusedseq.config, "settings", fusedseq.config.Settings(interpret=False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in missing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert missing() == "it needs compute capability 8.0 or newer, this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert missing() == "it needs triton 3.4 or newer, 3.3.1 is installed"
    monkeypatch.undo()
    monkeypatch.setattr(fusedseq.config, "settings", fusedseq.config.Settings(interpret=not INTERPRETING))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert missing() == "TRITON_INTERPRET changed after triton had been imported"


def test_a_cpu_call_never_comes_here_by_itself() -> None:
    call = registry.ScanCall("lstm", "cpu", torch.float32, 3, 2, 4, 5, 5, 1, False, False, False, False, True)
    assert registry.choose(call, "").name != "triton"


@triton.jit
def _apply(x, y, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n, other=0.0)
    if NAME == "sigmoid":
        v = cells.sigmoid(v)
    elif NAME == "tanh":
        v = cells.tanh(v)
    elif NAME == "d_gelu":
        v = activation.backward(v, "gelu")
    elif NAME == "d_gelu_tanh":
        v = activation.backward(v, "gelu_tanh")
    else:
        v = activation.forward(v, NAME)
    tl.store(y + at, v, mask=at < n)


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _apply[(triton.cdiv(len(x), 8192),)](x, y, len(x), NAME=name, BLOCK=8192)
    return y.cpu()


# Values of every magnitude, both signs.
MAGNITUDES = torch.cat([s * torch.logspace(-30, 1.93, 100_000, dtype=torch.float64).float() for s in (1.0, -1.0)])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """In units of float32's epsilon, of what is a normal number."""
    normal = want.abs() > 1.2e-38
    return float(((got.double() - want).abs() / want.abs())[normal].max() / torch.finfo(torch.float32).eps)


def test_sigmoid_and_tanh_keep_their_digits() -> None:
    x, exact = MAGNITUDES.to(DEVICE), MAGNITUDES.double()
    assert (
        relative_error(apply("sigmoid", x), torch.where(exact < 0, exact.exp(), 1.0) / (1 + (-exact.abs()).exp())) < 3
    )
    assert relative_error(apply("tanh", x), exact.tanh()) < 3


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_keep_their_digits(name: str) -> None:
    x, exact = MAGNITUDES[MAGNITUDES.abs() < 8], MAGNITUDES[MAGNITUDES.abs() < 8].double()
    got = apply(name, x.to(DEVICE)).double()
    if name == "gelu":  # the tail needs erfc, which torch's formula for float64 does not use
        want = exact * torch.special.erfc(-exact * 0.5**0.5) / 2
        assert relative_error(got, want) < 40  # e^(-x^2/2) loses what x^2 was rounded by
    else:
        want = bias_activation.activate(name, exact)
        assert float((got - want).abs().max()) < 1e-6
    if name != "silu":
        slope = bias_activation.derivative(name, exact)
        # s - s^2 of the approximation by tanh cancels where s is close to 1.
        bound = 1e-6 if name == "gelu" else 4e-6
        assert float((apply(f"d_{name}", x.to(DEVICE)).double() - slope).abs().max()) < bound


def test_not_a_number_and_infinity() -> None:
    inf = float("inf")
    x = torch.tensor([float("nan"), inf, -inf, -0.0], device=DEVICE)
    torch.testing.assert_close(apply("sigmoid", x), torch.tensor([float("nan"), 1, 0, 0.5]), equal_nan=True)
    torch.testing.assert_close(apply("tanh", x), torch.tensor([float("nan"), 1, -1, 0]), equal_nan=True)
    torch.testing.assert_close(apply("relu", x), torch.tensor([float("nan"), inf, 0, 0]), equal_nan=True)


def test_dtypes_are_those_advertised() -> None:
    taken = [d for d in DTYPES.values() if registry.backends()["triton"].supports(
        registry.ScanCall("gru", DEVICE, d, 3, 2, 4, 5, 5, 1, False, False, False, False, True)) is None]  # fmt: skip
    assert taken == [torch.float32, torch.bfloat16, torch.float16]
