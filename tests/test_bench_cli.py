"""The commands `fusedseq bench` and `fusedseq info` end to end, on tiny cases and made-up results."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import _as_users_run_it, _ceilings_are_not_what_is_tested, broken, made_run, two_peers  # noqa: F401

import fusedseq
from fusedseq import info
from fusedseq.__main__ import main as command
from fusedseq.bench import choice, compare, memory, results, revisions, rnn_peers, run, table, timing
from fusedseq.bench.cases import SETS, select
from fusedseq.bench.cli import main as bench

PACKAGE = Path(fusedseq.__file__).resolve().parent


def test_list_runs_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_case", None)
    assert bench(["--list", "--set", "streaming", "deepbench-training", "--family", "GRU"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 19
    assert lines[0].split() == ["GRU", "streaming", "B1", "T1", "I64", "H64", "streaming"]
    large = [line for line in lines if "large" in line]
    assert any("B32 T1500 I2816 H2816" in line for line in large)
    assert not any("B32 T1 I512 H512" in line for line in large)
    assert bench(["--list-sets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SETS)


def test_run_writes_json_and_csv(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    files = tmp_path / "new" / "result.json", tmp_path / "new" / "result.csv"
    chosen = ["--set", "smoke", "--budget", "0.01", "--threads", "1"]
    assert bench([*chosen, "--json", str(files[0]), "--csv", str(files[1])]) == 0
    printed = capsys.readouterr().out
    assert "mean" in printed
    assert "packed/padded" in printed

    value = json.loads(files[0].read_text())
    assert {"machine", "versions", "isa", "threads", "environment", "git", "settings", "ceilings"} <= value.keys()
    assert value["schema"] == results.SCHEMA
    assert len(value["results"]) == len(select(["smoke"]))
    for one in value["results"]:
        assert one["threads"] == 1
        for name in ("fusedseq", "torch"):
            peer = one["peers"][name]
            assert (peer["status"], len(peer["samples"]) >= 5, peer["median"] > 0) == ("ok", True, True)
            assert peer["error"] < 1e-5
        assert one["ratio_torch"] == pytest.approx(one["peers"]["torch"]["median"] / one["peers"]["fusedseq"]["median"])
        refused = {name: peer["reason"] for name, peer in one["peers"].items() if peer["status"] == "refused"}
        assert all(refused.values())
        rnn, training = one["case"]["kind"] == "rnn", one["case"]["mode"] == "training"
        assert ("padded" in one["peers"]) == (rnn and one["case"]["packed"])
        assert ("onnxruntime" in refused) >= (rnn and training)
        assert ("eager" in one["peers"]) == (one["case"]["kind"] == "attention")

    loaded = results.load(files[0])
    assert [str(one.case) for one in loaded.results] == [one["name"] for one in value["results"]]
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(one["peers"]) for one in value["results"])
    assert float(next(row for row in rows if row["peer"] == "torch")["median_s"]) > 0


def test_a_wrong_peer_gets_no_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(rnn_peers.BUILD, "stepwise", broken)
    chosen = ["--set", "smoke", "--case", "LSTM inference B2 T3 I4 H8", "--peers", "fusedseq", "torch", "stepwise"]
    assert bench([*chosen, "--budget", "0.01", "--json", str(tmp_path / "r.json")]) == 1
    assert "WRONG stepwise" in capsys.readouterr().out
    (one,) = (r for r in json.loads((tmp_path / "r.json").read_text())["results"] if not r["case"].get("proj"))
    wrong = one["peers"]["stepwise"]
    assert (wrong["status"], wrong["median"], wrong["samples"]) == ("wrong", None, [])
    assert wrong["error"] == pytest.approx(1e-3, rel=0.01)
    assert "norm error" in wrong["reason"]
    assert one["peers"]["fusedseq"]["status"] == "ok"
    assert one["best_peer"] == "torch"


def test_plot_writes_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [two_peers(1e-3 * n, 2e-3 * n, T=4**n) for n in (3, 4)] + [two_peers(3e-3, 1e-3, mode="training", T=64)]
    for one in found:
        one.sets.append("scaling-T")
    results.save(made_run(*found), tmp_path / "r.json")
    assert bench(["plot", str(tmp_path / "r.json"), "--out", str(tmp_path / "pictures")]) == 0
    names = {f"{name}.{kind}" for name in ("speedup", "roofline", "scaling-T") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    assert (tmp_path / "pictures" / "roofline.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "pictures" / "speedup.svg").read_text()
    assert info.cpu_model() in drawn  # the title names the machine
    assert "LSTM training B2 T64 I4 H8" in drawn


def test_compare_of_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # Between the two runs the whole machine became twice as slow, which says nothing about fusedseq.
    a = made_run(two_peers(1.0, 2.0), two_peers(1.0, 2.0, B=3), two_peers(1.0, 2.0, B=4), two_peers(1.0, 2.0, B=5))
    b = made_run(two_peers(2.0, 4.0), two_peers(1.0, 4.0, B=3), two_peers(2.5, 4.0, B=4), two_peers(1.0, 1.0, B=6))
    results.save(a, tmp_path / "a.json")
    results.save(b, tmp_path / "b.json")
    both = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert bench(["compare", *both]) == 0
    printed = capsys.readouterr().out
    assert "1 faster, 1 slower, 1 unchanged" in printed
    assert "only in A: LSTM inference B5" in printed
    assert "only in B: LSTM inference B6" in printed
    assert bench(["compare", *both, "--fail-slower", "30"]) == 0
    assert bench(["compare", *both, "--fail-slower", "20"]) == 1
    assert "over 20% slower: LSTM inference B4" in capsys.readouterr().out

    pairs, _ = compare.match(a.results, b.results)
    found = compare.compare(pairs, in_turns=False)
    assert [change.ratio for change in found.changes] == pytest.approx([1.0, 2.0, 0.8])
    assert [change.flag for change in found.changes] == ["", "faster", "slower"]
    assert found.means() == {("LSTM", "inference"): (3, pytest.approx(statistics.geometric_mean([1.0, 2.0, 0.8])))}
    turns = compare.compare(pairs, in_turns=True)
    assert [change.ratio for change in turns.changes] == pytest.approx([0.5, 1.0, 0.4])


def test_compare_of_the_installed_package_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--set", "smoke", "--budget", "0.2", "--case", "RNN inference B2 T3", "RNNCell inference"]
    chosen += ["attention training B2 H2", "EncoderLayer training B2 L5 d16 H2 dropout0.1"]
    assert bench(["compare", ".", ".", *chosen]) == 0
    printed = capsys.readouterr().out
    assert "RNN inference B2 T3 I4 H8" in printed
    assert sum(int(n) for n in printed.splitlines()[-1].replace(",", "").split() if n.isdigit()) == 4


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "PROCESSES", 1)
    sizes = ["--batch", "2", "--length", "3", "--inputs", "2", "--hidden", "8", "--layers", "1", "--steps", "2"]
    path = tmp_path / "table.json"
    assert bench(["table", "--model", "GRU", *sizes, "--budget", "0.05", "--json", str(path)]) == 0
    assert "GRU" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    assert row["parameters"] == sum(p.numel() for p in torch.nn.GRU(2, 8).parameters()) + 9
    assert row["entries"].keys() == {"torch", "fusedseq"}
    assert all(entry["samples_per_second"] > 0 and entry["peak_bytes"] >= 0 for entry in row["entries"].values())
    both = (row["entries"][name]["samples_per_second"] for name in ("fusedseq", "torch"))
    assert row["faster"] == pytest.approx(next(both) / next(both))


def test_table_refuses_a_wrong_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def build(library: Any, sizes: Any) -> torch.nn.Module:
        made = table.Recurrent(torch.nn.RNN(sizes.I, sizes.H, batch_first=True), sizes.H)
        if library is fusedseq:
            torch.nn.init.constant_(made.head.bias, 1.0)
        return made

    monkeypatch.setitem(table.MODELS, "RNN", build)
    assert bench(["table", "--model", "RNN", "--batch", "2", "--length", "3", "--hidden", "8"]) == 1
    assert "WRONG RNN" in capsys.readouterr().out


def test_memory_growth_is_that_of_the_work() -> None:
    code = """
import torch
from fusedseq.bench import memory
torch.ones(1 << 22).sum()
size, how = memory.growth(lambda: torch.ones(24 << 18).sum())
print(size / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 20 < float(done.stdout) < 40


def test_memory_growth_counts_what_was_freed_before() -> None:
    code = """
import torch
from fusedseq.bench import memory
held = [torch.ones(1 << 14) for _ in range(400)]  # too small to be mapped each on its own
last = torch.ones(1 << 14)
del held
size, how = memory.growth(lambda: [torch.ones(1 << 14) for _ in range(300)])
print(size / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 18 < float(done.stdout) < 25


def test_info_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    assert command(["info", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value.keys() == {"versions", "machine", "backends", "isa", "threads", "openmp", "environment"}
    assert value["versions"]["fusedseq"] == fusedseq.__version__
    assert value["versions"]["torch"] == torch.__version__
    assert value["backends"]["reference"] is None
    assert value["environment"]["OMP_PROC_BIND"] == "close"
    assert value["machine"]["cores"] >= 1
    assert command(["info"]) == 0
    assert "OMP_PROC_BIND" in capsys.readouterr().out


def test_info_without_core_and_extras() -> None:
    code = """
import sys
for name in ("fusedseq._cpu", "rich", "matplotlib", "onnx", "onnxruntime", "pytest"):
    sys.modules[name] = None
from fusedseq.__main__ import main
assert main(["info"]) == 0
"""
    given = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "FUSEDSEQ_BACKEND": "", "FUSEDSEQ_ISA": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr
    assert "missing: the compiled core" in done.stdout
    assert "there is no compiled core" in done.stdout


def test_the_package_does_not_load_the_benchmarks() -> None:
    code = "import sys, fusedseq; print([m for m in sys.modules if m.startswith(('fusedseq.bench', 'rich', 'onnx'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("rich", ["--set", "smoke"]), ("rich", ["table"]), ("matplotlib", ["plot", "r.json", "--out", "p"])],
)
def test_a_missing_extra_is_named(
    missing: str, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    assert bench(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert missing in said[0]
    assert choice.EXTRA in said[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--case", "no such case"], "no case to run"),
        (["--set", "deepbench-training", "--case", "H4096"], "meant for a GPU"),
        (["compare", "a.json", "HEAD"], "expected two results or two git revisions"),
        (["compare", "no.json", "none.json"], "no.json: No such file"),
        (["plot", __file__, "--out", "p"], "expected the JSON of"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert expected in said[0]


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--budget", "soon"], ["--set", "nothing"]])
def test_argument_errors_name_the_argument(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert arguments[0] in said
    assert arguments[1] in said


def test_revisions_are_built_apart_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    for text in ("first", "second"):
        (tmp_path / "file").write_text(text)
        git("add", "file")
        git("commit", "--quiet", "-m", text)

    def build(arguments: list[str], *given: Any, **more: str) -> str:
        if "pip" not in arguments:
            return really(arguments, *given, **more)
        assert more == {"FUSEDSEQ_REQUIRE_CORE": "1"}
        site, tree = map(Path, arguments[-2:])
        shutil.copytree(tree, site)
        return ""

    really = revisions._command
    monkeypatch.setattr(revisions, "_command", build)
    monkeypatch.setattr(revisions, "HERE", tmp_path)
    commits = [revisions.resolve(name) for name in ("HEAD~1", "HEAD", ".")]
    assert commits[:2] == [git("rev-parse", "HEAD~1"), git("rev-parse", "HEAD")]
    with revisions.built(commits, lambda text: None) as places:
        assert [(places[commit] / "file").read_text() for commit in commits[:2]] == ["first", "second"]
        assert places["."] == PACKAGE.parent
        assert len(git("worktree", "list").splitlines()) == 3
    assert len(git("worktree", "list").splitlines()) == 1
    assert not places[commits[0]].exists()
    with pytest.raises(revisions.RevisionError, match="'nothing'"):
        revisions.resolve("nothing")
