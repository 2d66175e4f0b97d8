"""Every tier of the CUDA scans on a GPU, where the parity matrix's sizes would all go to one or two of them: the
emulator's cases and larger ones, several tiles of rows, weights that only packing makes room for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fusedseq
from fusedseq import config, registry
from fusedseq.backends import cuda, cuda_products, cuda_scan
from fusedseq.ops import scan
from fusedseq.testing import Case, check
from fusedseq.testing.cases import CELLS, short

HALF_AND_SINGLE = [torch.bfloat16, torch.float16, torch.float32]
TIERS = ("step", "block", "cluster", "grid")
SMALL = ("T5B4I3H33-bi-lengths0-resets", "T6B11I3H40-bi-packed", "T3B20I16H64-cells-nostate", "T33B9I2H17-resets")
LARGE = ("T9B40I8H512-bi", "T5B24I4H390-lengths0", "T4B130I4H256-resets")
# Half types in tier grid: on 132 SMs these do not fit into shared memory, in one direction or both.
PACKED = ("T4B8I4H1536", "T3B33I4H1408-bi-lengths0-resets", "T3B16I4H2304-packed")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.missing() is not None, reason=f"no GPU for it: {cuda.missing()}"
)


def on_tier(
    name: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tf32: bool = False
) -> list[object]:
    """Both passes held to the rule; their plans. Skips what the tier refuses. `warp`: of tier cluster the kernels whose
    warps go their own way."""
    by_warp = name == "warp"
    asked = {"cuda_tier": "cluster" if by_warp else name, "cuda_cluster": "warp" if by_warp else "block"}
    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, **asked))
    x = torch.empty(0, dtype=dtype, device="cuda")
    sizes = (case.T, case.B, case.H, case.R, case.D)
    try:
        plans = [cuda_scan.plan(cuda.core(), x, case.cell, sizes, False, backward, tf32) for backward in (False, True)]
    except RuntimeError as error:
        pytest.skip(str(error))
    if by_warp and not any(plan.by_warp for plan in plans):
        pytest.skip("no warp takes it alone")
    with fusedseq.use_backend("cuda"), registry.record() as choices:
        check(scan, case, dtype, "cuda", tf32=tf32)
    assert {choice.backend for choice in choices} == {"cuda"}
    return plans


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=short)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("text", SMALL + LARGE)
@pytest.mark.parametrize("name", [*TIERS, "warp"])
def test_cuda_tiers(name: str, text: str, cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    on_tier(name, Case.parse(cell, text), dtype, monkeypatch)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("text", SMALL + LARGE)
@pytest.mark.parametrize("name", [*TIERS, "warp"])
def test_cuda_tiers_in_tf32(name: str, text: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_tier(name, Case.parse(cell, text), torch.float32, monkeypatch, tf32=True)


@pytest.mark.parametrize("dtype", [*HALF_AND_SINGLE, torch.float64], ids=short)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("text", SMALL + LARGE)
def test_cuda_products_past_torch(text: str, cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier step, with the vendor's library called by the backend itself."""
    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_products="direct"))
    monkeypatch.setattr(cuda_products, "DIRECTLY", 0)
    calls: list[object] = []
    found = cuda_products._library
    monkeypatch.setattr(cuda_products, "_library", lambda *a: calls.append(a) or found(*a))
    on_tier("step", Case.parse(cell, text), dtype, monkeypatch)
    assert bool(calls) is (cell != "gru_reset_before" or dtype in cuda_products.HALF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
@pytest.mark.parametrize("text", PACKED)
def test_cuda_packed_weights(text: str, cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = on_tier("grid", Case.parse(cell, text), dtype, monkeypatch)
    assert any(plan.packed for plan in plans) or torch.cuda.get_device_properties().multi_processor_count < 132  # type: ignore[attr-defined]
