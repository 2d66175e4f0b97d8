"""The loops that time barriers on a GPU, run by the emulator: that they end, synchronise and report. Their times mean
nothing here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cuda_emulated
import pytest

from fusedseq.bench import barriers
from fusedseq.bench.barriers import BarrierCase

ROUNDS = 11  # of no size of a group a multiple
# Fewer threads and CTAs than on a GPU, for the emulator's sake.
SMALL = [
    BarrierCase("block", 1, 64, tier="block"),
    BarrierCase("block", 1, 160, tier="block"),
    *(BarrierCase("cluster", ctas, 64) for ctas in (2, 8, 16)),
    *(BarrierCase("cluster_exchange", ctas, 64, 16, tier="cluster") for ctas in (2, 3, 8, 16)),
    *(BarrierCase(f"warp_exchange_{rows}", ctas, 256) for rows in (4, 8) for ctas in (2, 3, 5)),
    BarrierCase("flag", 2, 32),
    *(BarrierCase("grid_exchange", ctas, 64, 16, tier="grid") for ctas in (2, 3, 7)),
    BarrierCase("grid", 0, 64),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_barrier_hands_the_word_on_in_every_round(case: BarrierCase, seed: int) -> None:
    """`measure` raises if a round was lost; a barrier that orders too little is a race to the emulator."""
    with cuda_emulated.device(seed, sms=16):
        row = barriers.measure(cuda_emulated.module(), case, ROUNDS, "cpu")
    assert "reason" not in row, row
    assert row["ctas"] == (case.ctas or 16)
    core = cuda_emulated.module()
    assumed = core.assumed_clocks(core.tiers.index(case.tier), row["ctas"]) if case.tier else None
    assert row["assumed"] == assumed
    assert row["clocks"] > 0 and row["clocks_handed"] > 0
    assert row["ns"] > 0 and row["ns_handed"] > 0


def test_every_barrier_is_measured() -> None:
    core = cuda_emulated.module()
    assert {case.kind for case in SMALL} == {case.kind for case in barriers.cases()} == set(core.barriers)
    assert {(case.kind, case.ctas) for case in barriers.cases()} >= {
        ("cluster", 2), ("cluster", 8), ("cluster", 16),
        ("cluster_exchange", 2), ("cluster_exchange", 8), ("cluster_exchange", 16),
        ("warp_exchange_4", 16), ("warp_exchange_8", 16),
    }  # fmt: skip
    assert [case.threads for case in barriers.cases() if case.kind == "block"] == [128, 256, 384, 512, 1024]


def test_what_the_device_lacks_is_named() -> None:
    core = cuda_emulated.module()
    with cuda_emulated.device(capability=80, cluster=1):
        row = barriers.measure(core, BarrierCase("cluster", 8, 64), ROUNDS, "cpu")
    assert row["reason"].startswith("barrier_cluster (CTAs=8 threads=64 rounds=11 units=0): the largest cluster of the")
    with cuda_emulated.device(sms=4):
        row = barriers.measure(core, BarrierCase("grid", 4096, 64), ROUNDS, "cpu")
    assert row["reason"].startswith("barrier_grid (CTAs=4096")
    assert "clocks" not in row
    with cuda_emulated.device():
        row = barriers.measure(core, BarrierCase("warp_exchange_8", 2, 64), ROUNDS, "cpu")
    assert row["reason"].endswith("expected 256 threads")
    with pytest.raises(RuntimeError, match="rounds handed the word on 3 times"):
        barriers.measure(_Lossy(core), BarrierCase("block", 1, 64), ROUNDS, "cpu")


class _Lossy:
    """A module whose loop ends too early."""

    def __init__(self, core: object) -> None:
        self._core = core

    def __getattr__(self, name: str) -> object:
        return getattr(self._core, name)

    def barrier_rounds(self, kind: int, ctas: int, threads: int, rounds: int, *rest: object) -> None:
        self._core.barrier_rounds(kind, ctas, threads, 3, *rest)  # type: ignore[attr-defined]


def test_a_run_writes_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "barriers.json"
    wanted = [SMALL[0], dataclasses.replace(SMALL[2], ctas=32)]
    with cuda_emulated.device():
        barriers.run(cuda_emulated.module(), wanted, out, 3, "cpu")
    rows = json.loads(out.read_text())
    assert [row["case"] for row in rows] == ["barrier block 1 CTAs x 64", "barrier cluster 32 CTAs x 64"]
    assert "reason" in rows[1]
    assert barriers.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(case) for case in barriers.cases()]
