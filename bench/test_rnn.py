"""The cases under pytest-benchmark, torch.nn beside fusedseq in one group: `pytest bench --benchmark-compare`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fusedseq.bench.cases import Case, Work, cases


@pytest.fixture(scope="module", params=list(cases()), ids=lambda case: str(case).replace(" ", "-"))
def work(request: pytest.FixtureRequest) -> Work:
    case: Case = request.param
    made = Work(case)
    made.check()
    return made


@pytest.mark.parametrize("peer", ["torch", "fusedseq"])
def test_rnn(benchmark: BenchmarkFixture, work: Work, peer: str) -> None:
    benchmark.group = str(work.case)
    benchmark(work.run(peer))
