"""`make device` as far as it goes without a GPU: its order and time limits, its table, its list of cases."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import cuda_emulated
import pytest
import torch

from fusedseq import config, registry
from fusedseq.backends import cuda
from fusedseq.bench import barriers, device, device_cases, peers
from fusedseq.bench.attention_cases import AttentionCase
from fusedseq.bench.pointwise_cases import PointwiseCase
from fusedseq.bench.pointwise_cases import device as pointwise
from fusedseq.bench.rnn_cases import RecurrentCase
from fusedseq.bench.run import Gates
from fusedseq.bench.work import Refusal, Runner, make


def test_a_part_that_takes_too_long_is_stopped_with_all_it_started() -> None:
    started = time.monotonic()
    inner = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {inner!r}])"
    status, output = device.run([sys.executable, "-c", code], 2)
    assert status is None
    assert "begun" in output
    assert time.monotonic() - started < 30
    assert device.run([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 30) == (3, "x\n")


class Scripted(device.Session):
    """A session whose parts do nothing but say so."""

    def build(self, limit: float) -> list[device.Part]:
        return [device.Part("build", "ok", 0.0, f"{limit:.0f}")]

    def barriers(self, limit: float) -> list[device.Part]:
        self.report.barriers = [
            {"kind": "cluster_exchange", "ctas": 16, "threads": 256, "per_step": 1, "assumed": 900, "clocks": 1234.4,
             "clocks_handed": 1300.0, "ns": 700.0, "ns_handed": 750.0},
            {"kind": "block", "ctas": 1, "threads": 128, "per_step": 2, "assumed": 100, "clocks": 20.0,
             "clocks_handed": 60.0, "ns": 12.0, "ns_handed": 35.0},
            {"kind": "flag", "ctas": 2, "threads": 32, "per_step": 1, "assumed": None, "clocks": 800.0,
             "clocks_handed": 900.0, "ns": 450.0, "ns_handed": 500.0},
            {"kind": "cluster", "ctas": 16, "threads": 256, "per_step": 1, "assumed": None, "reason": "no | clusters"},
        ]  # fmt: skip
        return [device.Part("barriers", "ok")]

    def parity(self, limit: float) -> list[device.Part]:
        return [device.Part("parity", "failed", 0.0, "first\nlast | line")]

    def sanitizer(self, limit: float) -> list[device.Part]:
        return [device.Part(f"sanitizer {tool}", "ok") for tool in device.TOOLS]

    def benchmark(self, limit: float) -> list[device.Part]:
        self.report.benchmark = {"cases": recorded()}
        return [device.Part("benchmark", "ok")]


def recorded() -> list[dict[str, object]]:
    """Made-up times."""

    def peer(seconds: float | None, reason: str | None = None) -> dict[str, object]:
        return {"status": "ok" if seconds else "wrong", "median": seconds, "reason": reason}

    plan = {"forward": {"tier": "cluster", "ranks": 16, "rows": 16}}
    return [
        {"case": "LSTM a", "backend": "cuda", "plans": plan, "kernels": {"torch": ["lstm_persist x1"]},
         "peers": {"fusedseq": peer(0.001), "cudnn": peer(0.004)}},
        {"case": "LSTM b", "backend": "cuda", "plans": {}, "kernels": {},
         "peers": {"fusedseq": peer(0.001), "cudnn": peer(0.001)}},
        {"case": "GRU c", "backend": "cuda", "plans": {}, "kernels": {},
         "peers": {"fusedseq": peer(None, "norm error | too large"), "cudnn": peer(0.001)}},
        {"case": "LSTMPointwise d", "backend": "", "plans": {}, "kernels": {}, "copy": 0.0018,
         "bytes": 4 * 10**9, "peers": {"fusedseq": peer(0.002), "triton": peer(0.004), "torch": peer(0.004)}},
        {"case": "GRUPointwise e", "backend": "", "plans": {}, "kernels": {}, "copy": 0.0018,
         "bytes": 4 * 10**9, "peers": {"fusedseq": peer(None, "wrong"), "torch": peer(0.004)}},
    ]  # fmt: skip


def test_parts_run_in_order_and_a_failed_one_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main(["--part", "rnn", "--out", str(tmp_path)], Scripted) == 1
    text = (tmp_path / "device.md").read_text()
    assert text in capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:7] == [
        "build",
        "barriers",
        "parity",
        "sanitizer memcheck",
        "sanitizer racecheck",
        "sanitizer synccheck",
    ]
    assert "| parity | failed | 0 | last \\| line |" in text
    assert "| LSTM a | 1.000 | 4.000 | 4.00 | cuda cluster 16x16 | lstm_persist x1 |" in text
    assert "norm error \\| too large" in text
    assert "Geometric mean over 2 cases: 2.00; lowest 1.00." in text
    assert "| case | fusedseq, GB/s | of copy | triton, GB/s | of copy |" in text
    assert "| LSTMPointwise d | 2000 | 90% | 1000 | 45% |" in text
    assert "| GRUPointwise e |  |  |  |  |" in text
    assert "| cluster_exchange | 16 | 256 | 1234 | 1300 | 700 | 1234 | 900 |" in text
    assert "| block | 1 | 128 | 20 | 60 | 12 | 40 | 100 |" in text
    assert "| flag | 2 | 32 | 800 | 900 | 450 |  |  |" in text
    assert "| cluster | 16 | 256 |  |  |  | no \\| clusters |  |" in text
    report = json.loads((tmp_path / "device.json").read_text())
    assert [part["status"] for part in report["parts"]] == ["ok", "ok", "failed", "ok", "ok", "ok", "ok"]


def test_attention_is_told_in_operations() -> None:
    def peer(status: str, median: float | None, reason: str | None = None) -> dict[str, object]:
        return {"status": status, "median": median, "reason": reason}

    report = device.Report("a GPU", "attention")
    report.benchmark = {"cases": [
        {"case": "attention inference B1", "backend": "cuda", "operations": 4 * 10**12,
         "peers": {"fusedseq": peer("ok", 0.01), "triton": peer("wrong", None, "too large")}},
        {"case": "attention training B1", "backend": "cuda", "operations": 10**12,
         "peers": {"fusedseq": peer("ok", 0.01), "flash": peer("ok", 0.005)}},
    ]}  # fmt: skip
    text = device.table(report)
    assert "| case | backend | fusedseq | triton | flash |" in text
    assert "| attention inference B1 | cuda | 400.0 | wrong |  |" in text
    assert "| attention training B1 | cuda | 100.0 |  | 200.0 |" in text
    assert "- triton: too large (1 case)" in text
    assert "Geometric mean" not in text


def test_attention_runs_beside_every_kernel_of_torch() -> None:
    cases = device_cases.cases(["attention"])
    assert len(set(cases)) == len(cases)
    assert {case.L for case in cases} >= {1, 512, 2048, 8192, 16384}
    assert {case.E for case in cases} == {64, 128}
    assert all((case.device, case.dtype) == ("cuda", "bfloat16") for case in cases)
    for case in cases:
        ours, theirs = {"fusedseq", "cuda-mma", "cuda-hopper", "triton"}, {"flash", "cudnn-attention", "efficient"}
        assert ours | theirs <= set(device_cases.peers(case))
        assert not (case.window or case.lengths or case.bias) or "flex" in device_cases.peers(case)
    for E in (64, 128):  # what is asked for, of each kind at both head sizes, with and without a backward pass
        some = [case for case in cases if case.E == E]
        for mode in ("inference", "training"):
            of_mode = [case for case in some if case.mode == mode]
            plain = [case for case in of_mode if not (case.window or case.lengths or case.bias or case.dropout)]
            assert {case.L for case in plain if case.causal} >= {512, 2048, 16384}
            assert {case.L for case in plain if not case.causal} >= {512, 2048, 16384}
            assert all(any(getattr(case, kind) for case in of_mode) for kind in ("window", "lengths", "bias"))
        assert any(case.dropout for case in some)
    assert device_cases.peers(device_cases.cases(["rnn"])[0]) == ["fusedseq", "torch"]


def test_both_kinds_of_cuda_kernels_are_peers_or_say_why_not() -> None:
    small = AttentionCase("attention", "training", 2, 2, 40, 64, dtype="bfloat16", lengths=True)
    with cuda.emulated(cuda_emulated.module()), cuda_emulated.device():
        for case in (small, small.but(mode="inference", lengths=False, causal=True)):
            work = make(case)
            for name in ("cuda-mma", "cuda-hopper"):
                runner = peers.build(name, work)
                assert isinstance(runner, Runner), runner
                assert Gates(work).judge(runner).wrong is None
        before = config.settings.cuda_attention
        refused = peers.build("cuda-hopper", make(small.but(bias=True)))
        assert isinstance(refused, Refusal)
        assert "not hopper: attention forward: mma of cuda (not hopper: it takes no bias" in refused.reason
        assert config.settings.cuda_attention == before
    if not torch.cuda.is_available():
        refused = peers.build("cuda-mma", make(small))
        assert isinstance(refused, Refusal) and refused.reason.startswith("not usable: ")


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    report = Scripted("rnn", tmp_path, whole=1.0).go()
    assert [part.status for part in report.parts] == ["skipped"] * 5
    assert all(part.detail == "no time was left" for part in report.parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these parts run")
def test_without_a_gpu_nothing_is_called_measured(tmp_path: Path) -> None:
    session = device.Session("rnn", tmp_path)
    assert [part.status for part in session.sanitizer(5)] == ["skipped"]
    (listed,) = session.barriers(60)
    assert (listed.status, listed.detail) == ("skipped", f"{len(barriers.cases())} loops, listed only")
    (none,) = device.Session("attention", tmp_path).barriers(60)
    assert (none.status, none.detail) == ("skipped", "scans were not asked for")
    assert "Nothing here was measured" in device.table(session.report)


def test_the_cases_are_what_the_goals_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    cases = device_cases.cases(["rnn"])
    assert len(set(cases)) == len(cases)
    assert all(case.device == "cuda" and case.dtype in ("bfloat16", "float16") for case in cases)
    assert cases[0] == RecurrentCase("LSTM", "inference", 16, 1024, 768, 768, dtype="bfloat16", device="cuda")
    assert {case.family for case in cases} == {"LSTM", "GRU", "RNN", "LSTMPointwise", "GRUPointwise"}
    scans = [case for case in cases if isinstance(case, RecurrentCase)]
    assert any(case.packed for case in scans)
    assert any(case.bidirectional for case in scans)
    assert device_cases.main(["--list", "--part", "all"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[: len(cases)] == [str(case) for case in cases]
    assert any(line.startswith("attention") for line in listed)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", list(pointwise()), ids=str)
def test_pointwise_cases_pass_their_gate(case: PointwiseCase, backend: str) -> None:
    if backend == "triton" and (why := registry.backends()["triton"].missing()) is not None:
        pytest.skip(why)
    emulated = cuda.emulated(cuda_emulated.module()) if backend == "cuda" else contextlib.nullcontext()
    with emulated, cuda_emulated.device():
        for dtype in ("bfloat16", "float32"):
            work = make(case.tiny().but(device="cpu", dtype=dtype))
            runner = peers.build("fusedseq" if backend == "cuda" else "triton", work)
            assert isinstance(runner, Runner)
            assert Gates(work).judge(runner).wrong is None
            assert ("cuda" in runner.call.__qualname__) == (backend == "cuda")
            assert isinstance(peers.build("torch", work), Refusal)
    assert device_cases.peers(case) == ["fusedseq", "torch", "triton"]


def test_a_copy_moves_as_many_bytes() -> None:
    case = PointwiseCase("LSTMPointwise", "inference", 64, 32, dtype="bfloat16")
    assert case.compulsory_bytes() == 64 * 32 * (2 * 4 * 4 + 3 * 2)
    seconds = device_cases.copying(case)
    assert seconds is not None and seconds > 0
    assert device_cases.copying(RecurrentCase("LSTM", "inference", 2, 3, 4, 8)) is None
