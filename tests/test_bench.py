"""The benchmarks: what they choose, how they time, and that wrong results get no speed."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fusedseq.bench import choice, compare, deepbench, results, rnn_peers, rnn_work, run, timing, work
from fusedseq.bench.case import LARGE_OPERATIONS, Case
from fusedseq.bench.cases import SETS, select
from fusedseq.bench.parity import Gate
from fusedseq.bench.peers import build, takes
from fusedseq.bench.results import CaseResult, PeerResult, Run
from fusedseq.bench.rnn_cases import RecurrentCase

TINY = RecurrentCase("LSTM", "inference", B=2, T=3, I=4, H=8)


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """Without the poison of the other tests, which would be timed; and with torch's threads put back."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _ceilings_are_not_what_is_tested(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "ceilings" not in request.node.name:
        monkeypatch.setattr(run, "fma_peak", lambda threads, dtype="float32": 1e11)
        monkeypatch.setattr(run, "copy_bandwidth", lambda threads: 1e10)
        monkeypatch.setattr(run, "read_bandwidth", lambda threads: 1e11)


def test_deepbench_sizes() -> None:
    """Counts and corners of DeepBench's own files, and each size once."""
    training = list(deepbench.sizes(deepbench.TRAINING))
    inference = list(deepbench.sizes(deepbench.INFERENCE))
    device = list(deepbench.sizes(deepbench.DEVICE))
    assert (len(training), len(inference), len(device)) == (53, 69, 3)
    assert all(len(set(sizes)) == len(sizes) for sizes in (training, inference, device))
    assert ("RNN", 2560, 128, 50) in training
    assert ("LSTM", 1536, 8, 50) in training
    assert ("GRU", 512, 32, 1) in training
    assert ("GRU", 2816, 4, 1500) in inference
    assert ("RNN", 32, 1, 672) in device
    families = [family for family, *_ in training]
    assert [families.count(name) for name in ("RNN", "LSTM", "GRU")] == [12, 22, 19]


def test_every_case_prints_differently_and_survives_json() -> None:
    cases = select(list(SETS))
    assert len({str(case) for case in cases}) == len(cases)
    assert all(Case.of(json.loads(json.dumps(case.fields()))) == case for case in cases)


def test_the_sets_hold_what_they_promise() -> None:
    def sizes(name: str, of: Callable[[Any], Any]) -> list[Any]:
        return sorted({of(case) for case in SETS[name].make()})

    assert len(select(["grid"])) == 30
    assert sizes("scaling-T", lambda case: case.T) == [64, 256, 1024, 4096, 16384]
    assert sizes("scaling-B", lambda case: case.B) == [1, 4, 16, 64, 256]
    assert sizes("scaling-H", lambda case: case.H) == [64, 128, 256, 512, 1024]
    assert sizes("threads", lambda case: case.threads) == [1, 2]
    assert sizes("cells", lambda case: (case.B, case.H)) == [(B, H) for B in (1, 16) for H in (64, 256, 512)]
    assert sizes("streaming", lambda case: (case.B, case.T, case.H)) == [(1, 1, H) for H in (64, 128, 256, 512)]
    assert all(case.packed and case.bidirectional and case.layers == 3 for case in SETS["speech"].make())
    assert all(case.proj for case in SETS["projection"].make())


def test_select_merges_sets_and_filters() -> None:
    chosen = select(["rl", "grid"], families=["GRU"], modes=["training"], patterns=["b16 *", "H128"])
    assert [str(case) for case in chosen] == ["GRU training B1 T100 I64 H128", "GRU training B16 T100 I64 H128"]
    both = select(["grid", "threads"], families=["RNN"], threads=[2])
    named = RecurrentCase("RNN", "inference", 16, 100, 64, 128, threads=2)
    assert both[named] == ["grid", "threads"]
    assert len(select(["smoke"], dtypes=["float32", "bfloat16"])) == 2 * len(select(["smoke"]))


def test_operations_bytes_and_lengths() -> None:
    case = RecurrentCase("LSTM", "training", B=2, T=3, I=4, H=8)
    assert case.operations() == 3 * 2 * (2 * 3) * (4 * 8) * (4 + 8)
    assert case.compulsory_bytes() == 2 * 4 * (2 * 3 * (4 + 8) + 4 * 8 * (4 + 8))
    wide = RecurrentCase("GRU", "inference", B=1, T=1, I=4, H=8, layers=2, bidirectional=True, dtype="bfloat16")
    assert wide.operations() == 2 * 2 * (3 * 8) * ((4 + 8) + (16 + 8))
    projected = RecurrentCase("LSTM", "inference", B=1, T=1, I=4, H=8, proj=5)
    assert projected.operations() == 2 * (4 * 8 * (4 + 5) + 5 * 8)
    packed = RecurrentCase("RNN", "inference", B=5, T=100, I=4, H=8, packed=True)
    assert sorted(packed.lengths()) == [25, 44, 63, 82, 100]
    assert packed.lengths() != sorted(packed.lengths(), reverse=True)
    assert packed.operations() == 2 * 314 * 8 * (4 + 8)
    assert RecurrentCase("GRU", "inference", 1, 1500, 2816, 2816).large  # memory traffic, not operations
    assert RecurrentCase("GRU", "inference", 1, 1500, 2816, 2816).operations() < LARGE_OPERATIONS


def test_functions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(timing, "timed", lambda function, number, finish=None, turn=None: function() or 0.5)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: calls.append("pause"))
    functions = {name: (lambda name=name: calls.append(name)) for name in "AB"}
    taken = timing.interleave(functions, budget=6.0)
    assert calls == ["A", "B"] + ["A", "B"] * 7  # a warm-up, one call to plan by, six rounds
    assert taken["A"].samples == [0.5] * 6
    calls.clear()
    timing.interleave(functions, budget=5.0, pools={"A": "one", "B": "other"})
    assert calls[4:10] == ["A", "pause", "B", "pause", "A", "pause"]


def test_a_turn_enters_once_what_a_loop_would() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def turn():
        seen.append("enter")
        yield
        seen.append("leave")

    timing.timed(lambda: seen.append("call"), 3, turn=turn)
    assert seen == ["enter", "call", "call", "call", "leave"]
    seen.clear()
    timing.interleave({"A": lambda: seen.append("A"), "B": lambda: seen.append("B")}, 0.01, rounds=5, turns={"A": turn})
    entered = "".join(seen).replace("leave", ")").replace("enter", "(")
    assert re.fullmatch(r"((\(A+\))|B)+", entered) and entered.count("(") >= 7


def test_plan_spends_the_budget_and_keeps_five_rounds() -> None:
    assert timing.plan({"fast": 0.001, "slow": 0.1}, budget=2.0) == (15, {"fast": 66, "slow": 1})
    assert timing.plan({"slow": 10.0}, budget=1.0) == (5, {"slow": 1})


def test_median_and_spread() -> None:
    assert timing.middle([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 0.5)
    assert timing.middle([2.0]) == (2.0, 0.0)


def test_ceilings_are_plausible() -> None:
    measured = timing.fma_peak(1, rounds=200_000), timing.copy_bandwidth(1, mebibytes=16), timing.read_bandwidth(1)
    assert all(1e8 < value < 1e14 for value in measured)


def two_peers(ours: float, torch_seconds: float, spread: float = 0.01, **case: Any) -> CaseResult:
    """A made-up result; the samples differ by the spread."""

    def peer(seconds: float) -> PeerResult:
        samples = [seconds * (1 + spread * k) for k in (-2, -1, 0, 1, 2)]
        return PeerResult.of(timing.summary(samples), 1e-7)

    fields = {**TINY.fields(), **case}
    one = Case.of(fields)
    both = {"fusedseq": peer(ours), "torch": peer(torch_seconds)}
    return CaseResult(one, ["grid"], 2, both, "cpu", one.operations(), one.compulsory_bytes(), 1e11, ["torch"])


def made_run(*found: CaseResult) -> Run:
    made = run.begin({"made": "up"})
    made.ceilings["2"] = {"fma": 1e11, "copy": 2e10, "read": 2e11}
    made.results += found
    return made


def test_summary_is_geometric() -> None:
    found = [two_peers(1.0, 2.0), two_peers(1.0, 8.0, B=3), two_peers(1.0, 5.0, mode="training")]
    found.append(two_peers(1.0, 7.0, dtype="bfloat16"))
    found[0].peers["onnxruntime"] = PeerResult.of(timing.summary([0.5] * 5), 1e-7)
    found[0].rivals.append("onnxruntime")
    first, second, third = results.summarize(found)
    assert (first.family, first.mode, first.cases) == ("LSTM", "inference", 2)
    assert first.torch_mean == pytest.approx(4.0)
    assert first.torch_least == pytest.approx(2.0)
    assert first.best_mean == pytest.approx(math.sqrt(0.5 * 8.0))
    assert first.best_least == pytest.approx(0.5)
    assert (second.mode, second.torch_mean) == ("training", pytest.approx(5.0))
    assert (third.dtype, third.torch_mean) == ("bfloat16", pytest.approx(7.0))
    assert found[0].best() == "onnxruntime"
    assert found[0].of_peak() == pytest.approx(TINY.operations() / 1e11)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes(dtype: str) -> None:
    found = run.run_case(
        RecurrentCase("GRU", "training", 2, 3, 4, 8, dtype=dtype), [], ["fusedseq", "torch"], 0.005,
        {"fma": 1e11, f"fma {dtype}": 2e11},
    )  # fmt: skip
    assert [peer.status for peer in found.peers.values()] == ["ok", "ok"]
    assert found.peak == 2e11


def test_every_peer_agrees_with_torch_on_what_it_takes() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    took: set[str] = set()
    for case in select(["smoke"]):
        made = work.make(case)
        gates = run.Gates(made)
        for name in ("fusedseq", "torch", "eager", "onnxruntime", "stepwise"):
            if not takes(name, case):
                continue
            built = build(name, made)
            if isinstance(built, work.Refusal):
                assert built.reason
                continue
            assert gates.judge(built).wrong is None, (case, name)
            took.add(f"{name} {case.kind} {case.mode}")
    modes = ("inference", "streaming")
    assert took >= {f"{name} rnn {mode}" for name in ("fusedseq", "onnxruntime", "stepwise") for mode in modes}
    modes = ("inference", "training")
    assert took >= {f"{name} attention {mode}" for name in ("fusedseq", "torch", "eager") for mode in modes}
    assert took >= {f"{name} transformer {mode}" for name in ("fusedseq", "torch") for mode in modes}


class Broken(torch.nn.Module):
    """torch.nn's module, but for a thousandth."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any) -> Any:
        y, state = self.inner(*given)
        return y * 1.001, state


def broken(made: Any) -> Any:
    inner = made.same_weights(torch.nn.LSTM(made.case.I, made.case.H))
    return rnn_work.drive(made, Broken(inner))


def test_a_wrong_fusedseq_gets_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rnn_peers.BUILD, "fusedseq", broken)
    found = run.run_case(TINY, [], ["fusedseq", "torch"], 0.005, {"fma": 1e11})
    assert found.wrong.keys() == {"fusedseq"}
    assert (found.ratio("torch"), found.of_peak(), results.summarize([found])) == (None, None, [])


def test_a_peer_that_breaks_down_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(made: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(rnn_peers.BUILD, "stepwise", raising)
    found = run.run_case(TINY, [], ["fusedseq", "stepwise"], 0.005, {"fma": 1e11})
    assert found.wrong == {"stepwise": "raised RuntimeError: out of luck"}
    assert found.peers["fusedseq"].status == "ok"


def test_nan_is_wrong() -> None:
    made = work.make(TINY)
    outcome = made.yardstick()
    verdict = Gate(made).judge({"y": outcome["y"] * math.nan})
    assert verdict.wrong
    assert math.isnan(verdict.error)


def runner(made: work.Work) -> work.Runner:
    """Ours."""
    built = build("fusedseq", made)
    assert isinstance(built, work.Runner)
    return built


def test_stepwise_carries_the_state() -> None:
    case = RecurrentCase("LSTM", "streaming", 1, 1, 4, 8)
    made = rnn_work.make(case)
    y = runner(made).results()["y"]
    assert y.shape == (rnn_work.STREAMED, 1, 1, 8)
    assert not torch.equal(y[0], y[1])
    module, state = made.module, tuple(made.state)
    for step in y:
        expected, state = module(made.x, state)
        torch.testing.assert_close(step, expected.detach())


def test_packed_is_compared_row_by_row() -> None:
    case = RecurrentCase("GRU", "inference", 3, 8, 4, 8, packed=True)
    y = runner(rnn_work.make(case)).results()["y"]
    ended = torch.arange(8).unsqueeze(1) >= torch.tensor(case.lengths())
    assert ended.any()
    assert (y[ended] == 0).all()
    assert (y[~ended].abs().sum(-1) > 0).all()


def test_noise_hides_small_changes() -> None:
    def flag(ours: float, spread: float) -> str:
        found = compare.change(two_peers(1.0, 1.0, spread=spread), two_peers(ours, 1.0, spread=spread), True)
        assert found is not None
        return found.flag

    assert flag(1.05, spread=0.001) == "slower"
    assert flag(1.05, spread=0.05) == ""
    assert flag(1.015, spread=0.0) == ""  # below what two runs of the same code differ by


def test_onnxruntime_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    built = build("onnxruntime", work.make(TINY))
    assert isinstance(built, work.Refusal)
    assert choice.EXTRA in built.reason
