"""FUSEDSEQ_AUTOTUNE=1 without a GPU: what is tried, when and how often, and that whatever wins computes the same.

Times are made up; what a candidate computes is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fusedseq
from fusedseq import registry
from fusedseq.ops import bias_activation, layer_norm, scan
from fusedseq.testing import Case, check
from fusedseq.testing.cases import CELLS

if (reason := registry.backends()["triton"].missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from triton.runtime.errors import OutOfResources

from fusedseq.backends import triton_attention, triton_cell, triton_rows, triton_scan, triton_tuning
from fusedseq.backends.triton_tuning import Block, choose
from fusedseq.kernels import attention_config, scan_plan
from fusedseq.kernels import attention_mask as bits
from fusedseq.ops.attention import run as attention
from fusedseq.testing.attention_cases import AttentionCase
from fusedseq.testing.attention_compare import check_attention
from fusedseq.testing.row_cases import RowCase, check_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
X = torch.zeros(3, 4, device=DEVICE)
Measured = list[float]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measured]:
    """Tuning as on a GPU; each measurement runs its candidate once and takes less than the one before."""
    times: Measured = []

    def measure(call: Callable[[], object]) -> float:
        call()
        times.append(1 / (1 + len(times)))
        return times[-1]

    monkeypatch.setattr(fusedseq.config, "settings", dataclasses.replace(fusedseq.config.settings, autotune=True))
    monkeypatch.setattr(triton_tuning, "_fastest", {})
    monkeypatch.setattr(triton_tuning, "_measurable", lambda x: True)
    monkeypatch.setattr(triton_tuning, "_device", lambda x: (9, 0))
    monkeypatch.setattr(triton_tuning, "_capturing", lambda: False)
    monkeypatch.setattr(triton_tuning, "_measure", measure)
    yield times


def test_nothing_is_tried_unless_asked_for(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fusedseq.config.Settings().autotune is False
    assert fusedseq.config.load({}).autotune is False and fusedseq.config.load({"FUSEDSEQ_AUTOTUNE": "1"}).autotune
    monkeypatch.setattr(fusedseq.config, "settings", dataclasses.replace(fusedseq.config.settings, autotune=False))

    def fail(*args: Any) -> Any:
        raise AssertionError("tried")

    assert choose("key", "shipped", fail, fail, X) == "shipped" and not measured


def test_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusedseq.config, "settings", dataclasses.replace(fusedseq.config.settings, autotune=True))
    assert not triton_tuning._measurable(torch.empty(1, device="cpu"))
    assert (
        choose("on a CPU", "shipped", lambda: ["other"], lambda one: 1 / 0, torch.empty(1, device="cpu")) == "shipped"
    )


def test_the_fastest_is_found_once(measured: Measured) -> None:
    ran: list[str] = []
    for _ in range(2):
        assert choose("key", "a", lambda: ["b", "a", "c"], ran.append, X) == "c"
    assert ran == ["a", "b", "c"] and len(measured) == 3
    assert choose("another key", "a", list, ran.append, X) == "a" and len(measured) == 4
    assert choose("key", "b", lambda: ["a"], ran.append, X) == "a" and len(measured) == 6  # another thing ships


def test_what_does_not_fit_is_passed_over(measured: Measured) -> None:
    def launch(one: str) -> None:
        if one == "large":
            raise OutOfResources(1, 0, "shared memory")

    assert choose("fits", "small", lambda: ["middling", "large"], launch, X) == "middling"
    with pytest.raises(OutOfResources):
        choose("does not", "large", lambda: ["small"], launch, X)

    def broken(one: str) -> None:
        raise ValueError(one)

    with pytest.raises(ValueError, match="small"):  # a mistake is no matter of size
        choose("broken", "small", list, broken, X)


def test_each_gpu_for_itself(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    choose("key", "a", lambda: ["b"], len, X)
    monkeypatch.setattr(triton_tuning, "_device", lambda x: (8, 0))
    choose("key", "a", lambda: ["b"], len, X)
    assert len(measured) == 4


def test_nothing_is_measured_while_a_graph_is_captured(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tuning, "_capturing", lambda: True)
    assert choose("key", "a", lambda: ["b"], len, X) == "a" and not measured
    monkeypatch.setattr(triton_tuning, "_capturing", lambda: False)
    assert choose("key", "a", lambda: ["b"], len, X) == "b"
    monkeypatch.setattr(triton_tuning, "_capturing", lambda: True)
    assert choose("key", "a", lambda: ["b"], len, X) == "b"


def test_the_neighbours_of_tiles() -> None:
    block = Block(2, 512)
    assert {b.BM * b.BN for b in block.others() if b.BN != 512} == {1024}
    assert all(b.BN == 512 for b in block.others(whole=True)) and block not in block.others()
    assert all(b.BM >= 1 and b.BN >= 32 for b in Block(1, 32, 1).others())
    shipped = attention_config.Tile(64, 64, 8, 2)
    tried = attention_config.neighbours(shipped, "forward", 0)
    assert shipped not in tried and len(set(tried)) == len(tried) and not any(one.dealt for one in tried)
    causal = bits.CAUSAL.value | bits.TILED.value
    for kernel, features, dealt in (
        ("forward", causal, 1), ("dq", causal, 0), ("forward", bits.TILED.value, 0), ("forward", bits.CAUSAL.value, 0),
        ("forward", causal | bits.DROPOUT.value, 0),
    ):  # fmt: skip
        assert sum(one.dealt for one in attention_config.neighbours(shipped, kernel, features)) == dealt


def test_scans_are_tuned_whatever_the_batch(measured: Measured) -> None:
    def run(B: int, T: int = 3) -> None:
        with fusedseq.use_backend("triton"), torch.no_grad():
            fusedseq.GRU(4, 8, device=DEVICE)(torch.zeros(T, B, 4, device=DEVICE))

    run(2)
    first = len(measured)
    assert first >= 3
    run(5, T=4)
    assert len(measured) == first
    run(5, T=1)  # a step by itself is another thing
    assert len(measured) > first


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_measuring_leaves_a_call_as_it_is(cell: str, measured: Measured) -> None:
    """Each candidate runs before the one that counts, in both passes, on the tensors of the call."""
    with fusedseq.use_backend("triton"):
        check(scan, Case.parse(cell, "T3B2I4H9-lengths-resets-cells"), torch.float32, DEVICE)
        assert len(measured) >= 6  # of both passes


def test_nor_does_it_where_the_result_overwrites_the_input(measured: Measured) -> None:
    x = torch.randn(6, 40, device=DEVICE)
    want = torch.nn.functional.gelu(x + 1)
    with fusedseq.use_backend("triton"):
        got = bias_activation.overwrite(x, torch.ones(40, device=DEVICE), "gelu", 0.0)
    assert len(measured) >= 3 and got.data_ptr() == x.data_ptr()
    torch.testing.assert_close(got, want)


def shape(one: Any) -> Any:
    """What of a candidate the interpreter heeds: neither warps nor stages nor registers."""
    if isinstance(one, str):
        return one
    return tuple(getattr(one, name, None) for name in ("kind", "BM", "BN", "BK", "dealt"))


def picks(
    monkeypatch: pytest.MonkeyPatch, module: Any, keep: Callable[[Any], bool] = lambda one: True
) -> list[tuple[Any, int]]:
    """Replaces the choice by the one whose number is asked for; (candidates, number) of each choice are recorded."""
    made: list[tuple[Any, int]] = []

    def pick(key: Any, shipped: Any, others: Any, launch: Any, x: Any) -> Any:
        found = list({shape(one): one for one in reversed([shipped, *others()])}.values())[::-1]
        found = [one for one in found if keep(one)]
        made.append((found, pick.number))  # type: ignore[attr-defined]
        return found[pick.number % len(found)]  # type: ignore[attr-defined]

    pick.number = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "choose", pick)
    made.append((pick, 0))
    return made


def each(made: list[tuple[Any, int]], run: Callable[[], None], most: int = 12) -> int:
    """Runs with every candidate in turn; how many there were."""
    pick = made.pop()[0]
    for number in range(most):
        pick.number = number
        made.clear()
        run()
        if number + 1 >= max(len(found) for found, _ in made):
            return number + 1
    raise AssertionError(f"more than {most} candidates")


@pytest.mark.parametrize("cell", CELLS)
def test_every_plan_of_a_scan_is_right(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = picks(monkeypatch, triton_scan)
    text = "T2B3I4H17-bi-lengths-resets-cells"
    with fusedseq.use_backend("triton"):
        count = each(made, lambda: check(scan, Case.parse(cell, text), torch.float32, DEVICE))
    assert count >= 3


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_every_plan_of_many_rows_is_right(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = picks(monkeypatch, triton_scan, lambda plan: plan.BM == 64)
    with fusedseq.use_backend("triton"):
        each(made, lambda: check(scan, Case.parse(cell, "T3B67I4H32-resets"), torch.bfloat16, DEVICE))
    assert {plan.kind for found, _ in made for plan in found} == {"resident", "streamed", "step"}


def test_a_projection_with_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made = picks(monkeypatch, triton_scan)
    with fusedseq.use_backend("triton"):
        each(made, lambda: check(scan, Case.parse("lstm", "T2B3I4H20-proj7-lengths0"), torch.float32, DEVICE))


@pytest.mark.parametrize(
    ("family", "options"),
    [("LSTMCell", {}), ("GRUCell", {}), ("GRUCell", {"reset_after": False}), ("RNNCell", {})],
    ids=["lstm", "gru", "gru_reset_before", "rnn"],
)
def test_every_way_of_a_cell_is_right(family: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = picks(monkeypatch, triton_cell)
    torch.manual_seed(3)
    cell = getattr(fusedseq, family)(5, 40, device=DEVICE, **options)
    x, h, c = (torch.randn(7, size, device=DEVICE, requires_grad=True) for size in (5, 40, 40))
    up = [torch.randn(7, 40, device=DEVICE) for _ in range(2)]

    def outcome(backend: str) -> list[torch.Tensor]:
        with fusedseq.use_backend(backend):
            out = cell(x, (h, c) if family == "LSTMCell" else h)
            out = out if isinstance(out, tuple) else (out,)
            leaves = [x, h, *([c] if family == "LSTMCell" else []), *cell.parameters()]
            return [*out, *torch.autograd.grad(out, leaves, up[: len(out)])]

    wanted = outcome("reference")

    def compare() -> None:
        for got, want in zip(outcome("triton"), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    assert each(made, compare) >= 4
    assert ["products", "fused"] in [found for found, _ in made]


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (layer_norm, "layer_norm-19x70-residual-weight-bias-dropout-sum"),
        (bias_activation, "bias_activation-19x70-bias-silu-dropout"),
    ],
    ids=["layer_norm", "bias_activation"],
)
def test_every_tile_of_rows_is_right(op: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = picks(monkeypatch, triton_rows)
    with fusedseq.use_backend("triton"):
        assert each(made, lambda: check_rows(op.run, RowCase(text), torch.float32, DEVICE)) >= 2


def test_every_tile_of_attention_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    made = picks(monkeypatch, triton_attention)
    with fusedseq.use_backend("triton"):
        case = AttentionCase("B1H1L40S70E16-causal-dropout")
        assert each(made, lambda: check_attention(attention, case, torch.float32, device=DEVICE)) >= 4


def test_the_plans_that_ship() -> None:
    half, single = torch.bfloat16, torch.float32
    plan = scan_plan.plan
    for B in (1, 64, 2048):  # a tile of 16 rows for each multiprocessor
        assert plan("lstm", 64, 64, B, 1, half) == ("resident", 16, 64, 64, 8, 1, 240)
    assert plan("lstm", 64, 64, 4096, 1, half)[:4] == ("streamed", 64, 32, 32)
    assert plan("lstm", 32, 32, 4096, 1, half)[:3] == ("resident", 64, 32)
    assert plan("lstm", 256, 256, 2048, 2, half)[:2] == ("streamed", 64)
    assert plan("lstm", 256, 256, 2048, 2, half, (8, 0))[:2] == ("streamed", 16)
    assert plan("gru", 1024, 1024, 64, 1, half)[:2] == ("step", 16)
    for capability in ((8, 0), (9, 0)):
        assert plan("gru", 1024, 1024, 128, 1, half, capability)[:4] == ("step", 64, 32, 64)
    # Too few rows, sizes that cannot be read by 16 bytes, no tensor cores.
    assert plan("gru", 1024, 1024, 63, 2, half).BM == 16
    assert plan("gru", 1025, 1025, 512, 1, half).BM == plan("lstm", 1024, 1000, 512, 1, half).BM == 16
    assert plan("gru", 1024, 1024, 512, 1, single).BM == 16
    for H in (16, 32, 64, 256, 1024):
        for B in (1, 64, 4096):
            for dtype in (half, single):
                shipped = plan("lstm", H, H, B, 1, dtype)
                many = scan_plan.takes_many(H, H, B, dtype)
                found = scan_plan.others(shipped, H, H, many, dtype)
                assert shipped not in found and len(set(found)) == len(found) >= 2
                assert all(p.warps in (4, 8) and p.stages >= 1 and p.BN >= 16 and p.BK >= 16 for p in found)
                assert many or all(p.BM == 16 for p in found)
