"""The CUDA kernels against the float64 truth, run by the emulator: every tier, cell and dtype, under several seeds.

The emulated device's settings decide which tier a call takes, or FUSEDSEQ_CUDA_TIER's setting names one. On a machine
with a GPU tests/test_parity.py runs the same cases on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import cuda_emulated
import pytest
import torch
from stand_in import StandIn

import fusedseq
from fusedseq import config, registry
from fusedseq.backends import cuda, cuda_products, cuda_scan
from fusedseq.ops import scan
from fusedseq.ops.attention import run as attention
from fusedseq.testing import DTYPES, Case, baseline, check, evaluate, recurrent_tf32
from fusedseq.testing.attention_cases import AttentionCase, attention_cases
from fusedseq.testing.attention_compare import check_attention
from fusedseq.testing.cases import CELLS, GATES, compact_cases, short

BY_DEFAULT = cuda_products.tf32(torch.float32)  # before a test sets anything
HALF_AND_SINGLE = [dtype for dtype in DTYPES.values() if dtype != torch.float64]
# Sizes that need several ranks of a cluster, and rows that need several tiles.
CLUSTERED = """
T7B3I5H33-bi-packed
T4B7I3H17-bi-bf-lengths0-resets
T3B8I16H64-cells-nostate
T5B13I2H31-nobias-resets-permuted
T9B5I1H19-packed-resets-cells-nobias
T3B19I3H37-bi-lengths-resets-cells
"""


# Tier, case, largest cluster and ranks: all terms in registers, all with warps that share a tile of units, a part.
PARTLY = [
    ("block", "T3B3I2H60-lengths0-resets", 1, 1), ("block", "T4B11I3H33-bi-packed", 1, 1),
    ("cluster", "T3B5I2H60-bi-lengths0", 4, 2), ("cluster", "T3B7I2H140-bi-lengths0-resets", 4, 3),
    ("cluster", "T2B3I2H400-resets", 16, 5),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with cuda.emulated(cuda_emulated.module()), fusedseq.use_backend("cuda"):
        yield


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of `cluster` the kernels whose warps share sums, of `warp` those whose warps go their own way."""

    def force(name: str) -> None:
        cluster = "warp" if name == "warp" else "block"
        asked = dataclasses.replace(config.settings, cuda_tier=name.replace("warp", "cluster"), cuda_cluster=cluster)
        monkeypatch.setattr(config, "settings", asked)

    return force


def planned(case: Case, dtype: torch.dtype, backward: bool = False, tf32: bool = False) -> Any:
    x = torch.empty(0, dtype=dtype)
    sizes = (case.T, case.B, case.H, case.R, case.D)
    return cuda_scan.plan(cuda_emulated.module(), x, case.cell, sizes, case.proj > 0, backward, tf32)


def run(case: Case, dtype: torch.dtype, seed: int, tf32: bool = False, **device: int) -> None:
    with cuda_emulated.device(seed, **device), registry.record() as choices:
        check(scan, case, dtype, tf32=tf32)
    assert {(choice.backend, choice.how) for choice in choices} == {("cuda", "TF32" if tf32 else "")}


def rows(texts: str, dtypes: list[torch.dtype]) -> list[Any]:
    found = [(Case.parse(cell, text), dtype) for cell in CELLS for dtype in dtypes for text in texts.split()]
    return [pytest.param(case, dtype, id=case.id(dtype)) for case, dtype in dict.fromkeys(found)]


COMPACT = [
    pytest.param(case, dtype, id=case.id(dtype))
    for cell in CELLS
    for dtype in DTYPES.values()
    for case in compact_cases(cell)
]


@pytest.mark.parametrize(("case", "dtype"), COMPACT)
def test_step(case: Case, dtype: torch.dtype, tier: Any) -> None:
    tier("step")
    run(case, dtype, seed=1)


@pytest.mark.parametrize(("case", "dtype"), COMPACT)
def test_step_with_products_by_torch(
    case: Case, dtype: torch.dtype, tier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As steps with many weights have them."""
    tier("step")
    monkeypatch.setattr(cuda_products, "THROUGH_TORCH", 0)
    run(case, dtype, seed=1)


@pytest.mark.parametrize(("case", "dtype"), COMPACT)
def test_step_with_products_by_the_library(case: Case, dtype: torch.dtype, tier: Any, stand_in: StandIn) -> None:
    """The same with the backend's own calls of it, to which a stand-in answers on the CPU."""
    tier("step")
    before = stand_in.products
    run(case, dtype, seed=1)
    recurrent = case.T and case.B and case.cell != "gru_reset_before"
    assert stand_in.products - before >= (2 * case.T * (2 if case.bidirectional else 1) if recurrent else 0)


@pytest.mark.parametrize(("case", "dtype"), COMPACT)
def test_the_tier_that_a_large_device_chooses(case: Case, dtype: torch.dtype) -> None:
    fits = dtype != torch.float64 and not case.proj
    with cuda_emulated.device():
        if case.T and case.B:
            chosen = cuda_emulated.module().tiers[planned(case, dtype).tier]
            assert chosen in ({"block", "cluster"} if fits else {"step"})
    if fits:  # if not, this is test_step's
        run(case, dtype, seed=2)


@pytest.mark.parametrize(("case", "dtype"), rows(CLUSTERED, HALF_AND_SINGLE))
def test_cluster(case: Case, dtype: torch.dtype, tier: Any) -> None:
    tier("cluster")
    with cuda_emulated.device():
        assert planned(case, dtype).ranks > 1
    run(case, dtype, seed=3)


# On emulated SMs, each of which takes eight of these CTAs, and the rows of a tile that they make the planner choose.
SMALL_BY_WARP = [
    *((text, 8, 4) for text in CLUSTERED.split()),
    ("T3B13I3H60-bi-lengths0-resets", 1, 8), ("T5B20I3H37-packed", 1, 8), ("T4B20I1H33-cells", 1, 8),
    ("T1B20I3H40", 1, 8),
]  # fmt: skip
LARGE_BY_WARP = [
    ("T3B9I3H140-bi-bf-lengths0-resets-cells", 16, 4), ("T2B70I3H260-nostate", 2, 8),
    ("T3B9I3H509-lengths0-resets", 64, 4), ("T2B12I3H450", 4, 8), ("T4B3I2H512", 16, 4),
]  # fmt: skip
# In half types the sums of a large rnn_relu may fall on the other side of 0 (docs/dev/status.md). But for the
# activation its kernel is rnn_tanh's.
BY_WARP = [
    *((cell, *one) for one in SMALL_BY_WARP for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
    *((cell, *one) for one in LARGE_BY_WARP for cell in ("lstm", "gru", "rnn_tanh")),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize(("cell", "text", "sms", "tile"), BY_WARP)
def test_warps_that_go_their_own_way(cell: str, text: str, sms: int, tile: int, dtype: torch.dtype, tier: Any) -> None:
    tier("warp")
    case = Case.parse(cell, text)
    with cuda_emulated.device(sms=sms):
        chosen = [planned(case, dtype, backward) for backward in (False, True)]
    assert all(plan.by_warp for plan in chosen)
    if GATES[cell] > 1:
        assert chosen[0].rows == tile and chosen[0].ranks == max(2, -(-case.H // 32))
    run(case, dtype, seed=len(text) + sms, sms=sms)


TF32_BY_WARP = [
    *SMALL_BY_WARP, ("T3B9I3H140-bi-bf-lengths0-resets-cells", 16, 4), ("T2B40I3H253-nostate", 1, 8),
    ("T4B3I2H256-resets", 16, 4),
]  # fmt: skip


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize(("text", "sms", "tile"), TF32_BY_WARP)
def test_warps_that_go_their_own_way_in_tf32(text: str, sms: int, tile: int, cell: str, tier: Any) -> None:
    tier("warp")
    case = Case.parse(cell, text)
    with cuda_emulated.device(sms=sms):
        chosen = [planned(case, torch.float32, backward, tf32=True) for backward in (False, True)]
    assert all(plan.by_warp for plan in chosen)
    if GATES[cell] > 1:
        assert chosen[0].rows == tile and chosen[0].ranks == max(2, -(-case.H // 32))
    run(case, torch.float32, seed=len(text) + sms, tf32=True, sms=sms)


@pytest.mark.parametrize(
    ("cell", "text", "dtype"),
    [("gru_reset_before", "T3B5I3H37", torch.bfloat16), ("lstm", "T3B5I3H37", torch.float32),
     ("gru", "T2B2I3H513", torch.float16)],
)  # fmt: skip
def test_what_no_warp_takes_alone_the_block_does(cell: str, text: str, dtype: torch.dtype, tier: Any) -> None:
    tier("warp")
    case = Case.parse(cell, text)
    with cuda_emulated.device(sms=16):
        assert not planned(case, dtype).by_warp
    run(case, dtype, seed=1, sms=16)


@pytest.mark.parametrize(("case", "dtype"), rows(CLUSTERED, HALF_AND_SINGLE))
def test_grid(case: Case, dtype: torch.dtype, tier: Any) -> None:
    """On a device so small that the groups of some cases run in turns."""
    tier("grid")
    with cuda_emulated.device(sms=4):
        chosen = planned(case, dtype)
        assert chosen.ranks > 1
        assert chosen.together == 4 // chosen.ranks
    run(case, dtype, seed=9, sms=4)


TIERS = ("step", "block", "cluster", "grid")
SINGLE = [case for case, _ in (param.values for param in rows(CLUSTERED, [torch.float32]))]
PROJECTED = "T5B6I4H19-proj7-bi-lengths0-resets"


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.id(torch.float32))
@pytest.mark.parametrize("name", TIERS)
def test_tf32(name: str, case: Case, tier: Any) -> None:
    tier(name)
    run(case, torch.float32, seed=11 + TIERS.index(name), tf32=True, sms=4)


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.id(torch.float32))
def test_tf32_by_the_library(case: Case, tier: Any, stand_in: StandIn) -> None:
    tier("step")
    before = stand_in.rounded
    run(case, torch.float32, seed=16, tf32=True, sms=4)
    assert (stand_in.rounded > before) is (case.cell != "gru_reset_before")


def test_tf32_of_a_projection() -> None:
    run(Case.parse("lstm", PROJECTED), torch.float32, seed=15, tf32=True)


@pytest.mark.parametrize("name", TIERS)
def test_tf32_rounds_what_the_setting_allows_and_nothing_else(name: str, tier: Any) -> None:
    tier(name)
    case = Case.parse("lstm", "T3B9I3H40-bi-lengths0")
    outcomes = {}
    for allowed in (False, True):
        with cuda_emulated.device(), recurrent_tf32(allowed):
            outcomes[allowed] = evaluate(scan, baseline(case, torch.float32).inputs)
    rounded, exact = outcomes[True], outcomes[False]
    near = {name for name, t in exact.items() if (t - rounded[name]).norm() < 1e-5 * t.norm()}
    assert not near, "these came out as without TF32"
    # A row of no steps hands its state through as it came.
    inputs = baseline(case, torch.float32).inputs
    assert inputs.lengths is not None and inputs.h0 is not None
    idle = inputs.lengths == 0
    assert idle.any()
    assert torch.equal(rounded["h_n"][:, idle], inputs.h0[:, idle])


def test_tf32_follows_torchs_setting_for_recurrent_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BY_DEFAULT, "torch's own recurrent layers use TF32 on a GPU unless told otherwise"
    for allowed in (False, True):
        with recurrent_tf32(allowed):
            assert cuda_products.tf32(torch.float32) == allowed
            assert not any(cuda_products.tf32(dtype) for dtype in DTYPES.values() if dtype != torch.float32)
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if hasattr(rnn, "fp32_precision"):  # torch 2.9: an operator's own setting goes before the one for all
        with recurrent_tf32(True):
            monkeypatch.setattr(rnn, "fp32_precision", "ieee")
            assert not cuda_products.tf32(torch.float32)
            monkeypatch.undo()


def test_explain_says_that_tf32_ran() -> None:
    def report(dtype: torch.dtype) -> str:
        weights = [torch.zeros(12, 4, dtype=dtype), torch.zeros(12, 4, dtype=dtype)]
        return repr(fusedseq.explain(scan, "gru", torch.zeros(2, 3, 4, dtype=dtype), None, None, weights))

    with cuda_emulated.device(), recurrent_tf32(True):
        assert "-> cuda (TF32)" in report(torch.float32)
        assert "TF32" not in report(torch.bfloat16)
    with cuda_emulated.device(), recurrent_tf32(False):
        assert "TF32" not in report(torch.float32)


@pytest.mark.parametrize("seed", range(4, 8))
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["block", "cluster", "warp", "grid"])
def test_any_order_of_threads_gives_the_same_bits(name: str, cell: str, seed: int, tier: Any) -> None:
    tier(name)
    case = Case.parse(cell, "T4B9I3H40-bi-lengths0-resets")
    inputs = baseline(case, torch.bfloat16).inputs
    with cuda_emulated.device(0):
        first = evaluate(scan, inputs)
    with cuda_emulated.device(seed):
        again = evaluate(scan, inputs)
    for key, t in first.items():
        assert torch.equal(t, again[key]), f"{key} depends on the order in which threads run"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_clusters_of_every_size(ranks: int, cell: str, tier: Any) -> None:
    tier("cluster")
    case = Case.parse(cell, f"T3B5I2H{16 * ranks - 3}-resets")
    # Sized so that fewer ranks would not hold the weights or, where all fit, the largest cluster is this.
    with cuda_emulated.device(cluster=ranks, sms=16):
        assert 2 <= planned(case, torch.bfloat16).ranks <= ranks
    run(case, torch.bfloat16, seed=ranks, cluster=ranks, sms=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("name", "text", "largest", "ranks"), PARTLY)
def test_weights_in_registers(
    name: str, text: str, largest: int, ranks: int, cell: str, dtype: torch.dtype, tier: Any
) -> None:
    """Of all terms, of some, and of warps that share a tile of units or have one each."""
    tier(name)
    case = Case.parse(cell, text)
    with cuda_emulated.device(cluster=largest, sms=16):
        for backward in (False, True):
            chosen = planned(case, dtype, backward)
            assert chosen.holding and chosen.rows == 8 and chosen.ranks >= ranks
    run(case, dtype, seed=ranks, cluster=largest, sms=16)


PACKED = ("T3B5I2H100-bi-lengths0-resets", "T4B11I3H85-bi-packed", "T3B20I2H70-resets-cells", "T2B3I2H33-nostate")


def smallest(case: Case, dtype: torch.dtype, backward: bool) -> int:
    """KiB of shared memory of the smallest device that takes the scan in tier grid."""
    for size in range(1, 64):
        with cuda_emulated.device(sms=9, shared=size * 1024), contextlib.suppress(RuntimeError):
            planned(case, dtype, backward)
            return size
    raise AssertionError(f"{case} fits into no device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("text", PACKED)
def test_weights_packed_in_global_memory(text: str, cell: str, dtype: torch.dtype, tier: Any) -> None:
    """On a device too small for them: of forward or of backward, whichever needs more room, and mostly of both."""
    tier("grid")
    case = Case.parse(cell, text)
    shared = max(smallest(case, dtype, backward) for backward in (False, True)) * 1024
    with cuda_emulated.device(sms=9, shared=shared):
        plans = [planned(case, dtype, backward) for backward in (False, True)]
    assert any(one.packed for one in plans) or GATES[cell] == 1  # a small panel may always fit
    run(case, dtype, seed=len(text), sms=9, shared=shared)


@pytest.mark.parametrize("cell", CELLS)
def test_packed_weights_give_the_bits_of_those_in_shared_memory(cell: str, tier: Any) -> None:
    """The same tiles in the same order, from elsewhere."""
    tier("grid")
    case = Case.parse(cell, "T4B7I3H40-bi-lengths0-resets")
    inputs = baseline(case, torch.bfloat16).inputs
    found: dict[tuple[int, int], dict[bool, Any]] = {}  # by rows and units, then by whether weights are packed
    for shared in range(smallest(case, torch.bfloat16, False), 64):
        with cuda_emulated.device(1, sms=9, shared=shared * 1024), torch.no_grad():
            chosen = planned(case, torch.bfloat16)
            outcomes = found.setdefault((chosen.rows, chosen.units), {})
            if (chosen.packed > 0) not in outcomes:
                arguments = (inputs.x, inputs.h0, inputs.c0, inputs.weights)
                outcomes[chosen.packed > 0] = scan(cell, *arguments, **inputs.keywords())
    both = [outcomes for outcomes in found.values() if len(outcomes) == 2]
    assert both or GATES[cell] == 1
    for outcomes in both:
        for one, two in zip(outcomes[False], outcomes[True], strict=True):
            assert one is two is None or torch.equal(one, two)


def test_registers_make_room_for_more_units(tier: Any) -> None:
    tier("cluster")
    with cuda_emulated.device(sms=132):
        for backward in (False, True):
            large = Case.parse("lstm", f"T2B16I2H{528 if backward else 624}")
            chosen = planned(large, torch.bfloat16, backward)
            assert chosen.holding and chosen.shared <= 232448
        with pytest.raises(RuntimeError, match="do not fit into shared memory"):
            planned(large, torch.float32)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recompute_gives_the_same_gradients(cell: str) -> None:
    case = Case.parse(cell, "T6B5I4H19-bi-lengths0-resets-cells")
    inputs = baseline(case, torch.float32).inputs

    def again(*args: Any, **kwargs: Any) -> Any:
        return scan(*args, recompute=True, **kwargs)

    with cuda_emulated.device():
        kept, formed = evaluate(scan, inputs), evaluate(again, inputs)
    for key, t in kept.items():
        assert torch.equal(t, formed[key]), key


def test_autocast_reaches_no_product_inside() -> None:
    inputs = baseline(Case.parse("gru", "T4B3I5H19-bi"), torch.bfloat16).inputs
    with cuda_emulated.device():
        plain = evaluate(scan, inputs)
        with torch.autocast("cpu", torch.float16):
            wide = evaluate(scan, baseline(Case.parse("gru", "T4B3I5H19-bi"), torch.float64).inputs)
        with torch.autocast("cpu", torch.bfloat16):
            cast = evaluate(scan, inputs)
    assert all(t.dtype == torch.float64 for t in wide.values())
    for key, t in plain.items():
        assert torch.equal(t, cast[key]), key


@pytest.mark.parametrize("name", ["step", "block", "cluster", "warp", "grid"])
def test_a_row_does_not_depend_on_its_batch(name: str, tier: Any) -> None:
    tier(name)
    case = Case.parse("gru", "T4B17I3H33-bi")
    inputs = baseline(case, torch.bfloat16).inputs
    with cuda_emulated.device(), torch.no_grad():
        y = scan("gru", inputs.x, inputs.h0, None, inputs.weights, bidirectional=True)[0]
        for b in (0, 16):
            one = scan("gru", inputs.x[:, b : b + 1], inputs.h0[:, b : b + 1], None, inputs.weights, bidirectional=True)
            assert torch.equal(y[:, b : b + 1], one[0]), b


@pytest.mark.parametrize(
    ("name", "dtype"), [("cluster", torch.float32), ("warp", torch.bfloat16), ("grid", torch.float32)]
)
@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_falls_silent_is_an_error(
    backward: bool, name: str, dtype: torch.dtype, tier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier(name)
    case = Case.parse("lstm", "T4B3I3H40")
    honest = cuda_scan.plan

    def stuck(*args: Any) -> Any:
        chosen = honest(*args)
        if args[5] == backward:
            chosen.stuck = 1
        return chosen

    monkeypatch.setattr(cuda_scan, "plan", stuck)
    kernel = f"{name}_{'backward' if backward else 'forward'}"
    with cuda_emulated.device(), pytest.raises(RuntimeError, match=rf"{kernel} \(lstm \w+ T=4 B=3 H=40 .*trap"):
        evaluate(scan, baseline(case, dtype).inputs)
    with pytest.raises(cuda_scan.Fault, match="waited in vain"):
        cuda_scan.check_fault(torch.device("cpu"))
    # The next call is served as if nothing had happened.
    monkeypatch.setattr(cuda_scan, "plan", honest)
    run(case, dtype, seed=0)


def test_a_named_tier_takes_the_call_or_says_why_not(tier: Any) -> None:
    case = Case.parse("lstm", "T2B2I2H400")
    x = baseline(Case.parse("lstm", "T2B2I2H4"), torch.float64).inputs
    tier("block")
    with cuda_emulated.device():
        with pytest.raises(RuntimeError, match=r"tier block refuses lstm float64 .*H=4.*float64"):
            evaluate(scan, x)
        with pytest.raises(RuntimeError, match=r"tier block refuses .*do not fit into shared memory"):
            planned(case, torch.bfloat16)
    tier("cluster")
    ampere = cuda_emulated.device(capability=80, cluster=1)
    with ampere, pytest.raises(RuntimeError, match="the device has no clusters"):
        planned(case, torch.bfloat16)


def test_the_device_decides_the_tier() -> None:
    tiers = cuda_emulated.module().tiers
    for text, settings, expected in (
        ("T2B16I2H16", {}, "block"),
        ("T2B16I2H144", {}, "cluster"),
        ("T2B16I2H112", {"cluster": 1, "capability": 80}, "block"),
        ("T2B16I2H144", {"cluster": 1, "capability": 80}, "grid"),
        ("T2B16I2H144", {"shared": 12 * 1024}, "step"),
    ):
        with cuda_emulated.device(**settings):
            chosen = planned(Case.parse("lstm", text), torch.bfloat16)
            assert tiers[chosen.tier] == expected, (text, settings)


def test_it_takes_cpu_tensors_only_while_emulated() -> None:
    x = torch.zeros(2, 3, 4)
    weights = [torch.zeros(12, 4), torch.zeros(12, 4)]
    with cuda_emulated.device():
        scan("gru", x, None, None, weights)
    before = cuda._emulator
    cuda._emulator = None
    registry.forget()
    try:
        with pytest.raises(registry.BackendError, match="'cuda' was asked for by name but"):
            scan("gru", x, None, None, weights)
    finally:
        cuda._emulator = before


ATTENTION = [
    pytest.param(case, dtype, id=case.id(dtype))
    for dtype in (torch.bfloat16, torch.float16)
    for case in attention_cases(dtype)
]


@pytest.mark.parametrize(("case", "dtype"), ATTENTION)
def test_attention(case: AttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the portable kernels; those for Hopper, which the emulated device would take, have their own.
    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_attention="mma"))
    with cuda_emulated.device(12), registry.record() as choices:
        check_attention(attention, case, dtype)
    assert {choice.backend for choice in choices} == {"cuda"}


def test_every_kind_of_call_ran() -> None:
    """All cells and dtypes stand in the lists above."""
    seen = {(param.values[0].cell, short(param.values[1])) for param in COMPACT}
    assert seen == {(cell, name) for cell in CELLS for name in DTYPES}
