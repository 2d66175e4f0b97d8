"""The cases under pytest-benchmark, the peers of one case in one group: `pytest bench --benchmark-compare`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fusedseq.bench.case import Case
from fusedseq.bench.cases import DEFAULT_SETS, select
from fusedseq.bench.peers import DEFAULT_PEERS, PEERS, build, takes
from fusedseq.bench.run import Gates
from fusedseq.bench.work import Refusal, Work, make

CASES = list(select([*DEFAULT_SETS, "attention"]))
PEER_NAMES = [name for name in DEFAULT_PEERS if not PEERS[name].companion]
PAIRS = [(case, peer) for case in CASES for peer in PEER_NAMES if takes(peer, case)]


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> tuple[Work, Gates]:
    case: Case = request.param
    work = make(case)
    return work, Gates(work)


@pytest.mark.parametrize(
    ("prepared", "peer"),
    PAIRS,
    indirect=["prepared"],
    scope="module",
    ids=[f"{case}-{peer}".replace(" ", "-") for case, peer in PAIRS],
)
def test_case(benchmark: BenchmarkFixture, prepared: tuple[Work, Gates], peer: str) -> None:
    work, gates = prepared
    built = build(peer, work)
    if isinstance(built, Refusal):
        pytest.skip(built.reason)
    assert gates.judge(built).wrong is None
    benchmark.group = str(work.case)
    with built.turn():
        benchmark(built.call)
