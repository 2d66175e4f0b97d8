"""The cases under pytest-benchmark, the peers of one case in one group: `pytest bench --benchmark-compare`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fusedseq.bench.cases import Case, select
from fusedseq.bench.parity import Gate
from fusedseq.bench.peers import DEFAULT_PEERS, PEERS
from fusedseq.bench.work import Refusal, Work

CASES = list(select())
PEER_NAMES = [name for name in DEFAULT_PEERS if name != "padded"]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: str(case).replace(" ", "-"))
def prepared(request: pytest.FixtureRequest) -> tuple[Work, Gate]:
    case: Case = request.param
    work = Work(case)
    return work, Gate(work, PEERS["torch"].build(work).results())


@pytest.mark.parametrize("peer", PEER_NAMES)
def test_rnn(benchmark: BenchmarkFixture, prepared: tuple[Work, Gate], peer: str) -> None:
    work, gate = prepared
    built = PEERS[peer].build(work)
    if isinstance(built, Refusal):
        pytest.skip(built.reason)
    verdict = gate.judge(built.results())
    assert verdict.wrong is None
    benchmark.group = str(work.case)
    benchmark(built.call)
