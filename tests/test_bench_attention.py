"""Attention and the Transformer's modules in the benchmarks: truths, peers, goals and memory."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import _as_users_run_it, _ceilings_are_not_what_is_tested, made_run, two_peers  # noqa: F401
from torch import Tensor

import fusedseq
from fusedseq.bench import attention_peers, attention_work, goals, memory, report, results, run, table, transformer_work
from fusedseq.bench.attention_cases import AttentionCase
from fusedseq.bench.case import Case
from fusedseq.bench.cases import GROUPS, SETS, select
from fusedseq.bench.cli import main as bench
from fusedseq.bench.peers import build, takes
from fusedseq.bench.timing import summary
from fusedseq.bench.transformer_cases import TransformerCase
from fusedseq.bench.work import Refusal, Runner, make
from fusedseq.reference import attention as reference
from fusedseq.testing.attention_cases import AttentionCase as Words
from fusedseq.testing.attention_cases import AttentionInputs
from fusedseq.testing.attention_compare import compare_with

SMALL = [
    AttentionCase("attention", "training", 2, 4, 9, 8),
    AttentionCase("attention", "training", 2, 4, 7, 8, S=13, K=2),
    AttentionCase("attention", "training", 1, 4, 11, 8, K=2, causal=True),
    AttentionCase("attention", "training", 2, 4, 12, 8, K=2, causal=True, window=4),
    AttentionCase("attention", "training", 2, 4, 9, 8, K=1, causal=True, dropout=0.3),
    AttentionCase("attention", "training", 3, 4, 9, 8, K=2, lengths=True),
    AttentionCase("attention", "training", 2, 2, 9, 8, causal=True, lengths=True),
    AttentionCase("attention", "training", 2, 4, 9, 8, S=13, bias=True),
    AttentionCase("attention", "training", 2, 4, 9, 8, K=2, causal=True, bias=True),
    AttentionCase("attention", "inference", 2, 4, 1, 8, S=70, K=1),
    AttentionCase("attention", "training", 2, 2, 12, 8, window=4, global_keys=2),
]


def small(case: AttentionCase) -> attention_work.AttentionWork:
    return attention_work.make(case)


def runner(name: str, work: Any) -> Runner:
    built = build(name, work)
    assert isinstance(built, Runner), built
    return built


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_truth_by_blocks_is_the_specification(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_work, "BLOCK", 40)  # a few rows at a time
    work = small(case.but(mode="training"))
    whole = compare_with(AttentionInputs(Words("B1H1L1S1E1"), work.problem, work.dout, None))
    truth = work.truth()
    assert truth.keys() == {"out", "dq", "dk", "dv"} | ({"dbias"} if case.bias else set())
    for name, t in truth.items():
        torch.testing.assert_close(t, whole.truth[name], rtol=1e-12, atol=1e-12)
    assert work._terms["dq"] == pytest.approx(whole.terms["dq"])
    assert work._terms["dk"] == pytest.approx(whole.terms["dk"])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_form_of_a_peer_is_right(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the fastest somewhere."""

    def all_of(work: Any, forms: Callable[[float], Mapping[str, Any]], stepwise: bool = False) -> Any:
        taken.append(forms(0.0))
        return Refusal("all forms are taken")

    taken: list[Mapping[str, Any]] = []
    monkeypatch.setattr(attention_peers, "_fastest", all_of)
    work = attention_work.without_dropout(small(case))
    gates = run.Gates(work)
    attention_peers.torch_sdpa(work)
    attention_peers.eager(work)
    of_torch, of_eager = taken
    grouped = case.key_heads != case.H
    varied = case.lengths or case.bias  # tables that differ between batch rows or heads
    folded = 0 if varied else 2 if case.window else int(not case.causal)
    assert len(of_torch) == (2 if case.window or case.lengths else 1) * (1 + grouped) + grouped * folded
    assert len(of_eager) == (1 if varied else 2 * (1 + grouped))
    for forms in taken:
        for name, form in forms.items():
            assert gates.judge(attention_work.drive(work, form)).wrong is None, name


def test_the_fastest_form_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = attention_peers.TRIALS
    seconds = iter([0.2, *[0.2] * trials, 5.0, 0.2, *[0.1] * trials])
    monkeypatch.setattr(attention_peers, "timed", lambda call, number, finish: next(seconds))
    called: list[str] = []

    def form(name: str) -> Callable[..., Tensor]:
        return lambda q, k, v: called.append(name) or q

    work = small(SMALL[0].but(mode="inference"))
    built = attention_peers._fastest(work, lambda dropout: {name: form(name) for name in ("slow", "long", "fast")})
    called.clear()
    built.call()
    assert called == ["fast"]


def test_what_is_wrong_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(**changes: Any) -> Callable[[Any], Runner]:
        def built(work: Any) -> Runner:
            given = {"mask": fusedseq.Mask("top-left", (3, None)), **changes}
            return attention_work.drive(work, lambda q, k, v: fusedseq.attention(q, k, v, **given))

        return built

    case = SMALL[3]
    for changes, wrong in (
        ({}, False),
        ({"scale": 8**-0.5 * 1.001}, True),
        ({"mask": fusedseq.Mask("top-left", (4, None))}, True),
        ({"mask": fusedseq.Mask("top-left")}, True),
    ):
        monkeypatch.setitem(attention_peers.BUILD, "fusedseq", attention(**changes))
        found = run.run_case(case, [], ["fusedseq", "torch"], 0.005, {"fma": 1e11})
        assert set(found.wrong) == ({"fusedseq"} if wrong else set())
        assert (found.ratio("torch") is None) == wrong


def test_dropout_is_compared_where_numbers_are_known() -> None:
    case = SMALL[4]
    work = small(case)
    gates = run.Gates(work)
    ours, theirs = runner("fusedseq", work), runner("torch", work)
    assert ours.judged_by is None
    assert theirs.judged_by is not None
    assert theirs.judged_by.case == case.but(dropout=0.0)
    assert gates.judge(ours).wrong is None
    assert gates.judge(theirs).wrong is None
    # What is timed does drop, and draws anew.
    for one in (ours, theirs):
        first, second = (one.call() for _ in range(2))
        assert isinstance(first, dict)
        assert isinstance(second, dict)
        assert not torch.equal(first["out"], second["out"])
        assert torch.equal(one.results()["out"], one.results()["out"])
    # Other random numbers than the specification's are wrong.
    q, k, v, mask = work.q, work.k, work.v, fusedseq.Mask("top-left")
    other = fusedseq.attention(q, k, v, mask=mask, dropout_p=case.dropout, seed=attention_work.SEED + 1)
    assert gates.judge(Runner(ours.call, lambda: {**ours.results(), "out": other})).wrong


def test_a_half_type_is_judged_strictly_but_for_eager() -> None:
    """Ours by twice the error of torch's kernel, a peer that rounds between its steps by such steps."""
    case = AttentionCase("attention", "inference", 1, 4, 96, 32, dtype="bfloat16")
    work = small(case)
    gates = run.Gates(work)
    ours, eager = runner("fusedseq", work), runner("eager", work)
    assert ours.judged_by is None
    assert isinstance(eager.judged_by, attention_work.AttentionWork)
    assert eager.judged_by.stepwise
    assert not work.stepwise
    assert gates.judge(ours).wrong is None
    assert gates.judge(eager).wrong is None
    assert len(gates._gates) == 2
    off = {"out": eager.results()["out"] * 1.05}
    assert gates.judge(Runner(eager.call, lambda: off, judged_by=eager.judged_by)).wrong


def test_flex_masks_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, which takes half a minute: FlexAttention's own eager path is given the same arguments."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in (SMALL[0], SMALL[1], SMALL[2], SMALL[3], SMALL[-1]):
            work = small(case.but(mode="inference", E=16))
            assert run.Gates(work).judge(runner("flex", work)).wrong is None
        refused = build("flex", small(SMALL[4]))
        assert refused == Refusal("FlexAttention has no dropout")
        refused = build("flex", small(SMALL[0]))
    assert isinstance(refused, Refusal)
    assert "backward" in refused.reason


def test_operations_count_what_is_seen() -> None:
    for case in SMALL:
        for W in {case.window, 0, 1, 100} if case.causal else {case.window}:
            one = case.but(window=W, mode="inference")
            seen = int(reference.visible(small(one).problem).expand(one.B, 1, one.L, one.keys).sum())
            assert one.operations() == 4 * one.H * one.E * seen
            assert one.but(mode="training").operations() == int(3.5 * one.operations())
    assert SMALL[1].compulsory_bytes() == 2 * 4 * (2 * 2 * 4 * 7 * 8 + 2 * 2 * 2 * 13 * 8)
    layer = TransformerCase("TransformerEncoderLayer", "inference", 2, 5, 16, 2)
    weights = [t for t in transformer_work.make(layer).module.parameters() if t.dim() == 2]
    assert layer.operations() == 2 * 2 * 5 * sum(t.numel() for t in weights) + 4 * 2 * 5 * 5 * 16
    alone = layer.but(family="MultiheadAttention")
    weights = [t for t in transformer_work.make(alone).module.parameters() if t.dim() == 2]
    assert alone.weights() == sum(t.numel() for t in weights)


def test_the_sets_of_attention() -> None:
    assert all(case.dtype == "bfloat16" for case in select(["attention-bf16"]))
    assert all(case.dtype == "bfloat16" for case in select(["attention-bf16"], dtypes=["float32"]))
    assert len(select(["attention-full"], dtypes=["float32", "bfloat16"])) == 2 * len(select(["attention-full"]))
    named = {name for names in select(["attention"]).values() for name in names}
    assert named == set(GROUPS["attention"])
    assert {"encoder-layer", "mha", "attention-decode"} <= named
    assert not any(case.large for case in select(["attention", "scaling-L", "attention-memory"]))

    def cases(name: str) -> list[Any]:
        return list(SETS[name].make())

    assert all(c.E in (64, 128) and c.L >= 2048 and not c.causal for c in cases("attention-full"))
    assert all(c.causal and c.L <= 512 and not c.window for c in cases("attention-causal"))
    assert all(c.L <= 128 or c.E <= 32 for c in cases("attention-short"))
    assert {c.L for c in cases("attention-dropout")} == {128, 512, 2048}
    assert {(c.window, c.L) for c in cases("attention-window")} == {(256, 4096), (256, 16384)}
    assert {(c.L, c.S, c.H // c.K) for c in cases("attention-decode")} == {(1, 512, 8), (1, 4096, 8)}
    assert {c.d for c in cases("encoder-layer")} == {128, 256, 512}
    assert all(c.dropout == (0.1 if c.mode == "training" else 0) for c in cases("encoder-layer"))


@pytest.mark.parametrize("family", ["TransformerEncoderLayer", "MultiheadAttention"])
def test_a_module_is_compared_without_dropout_and_timed_with_it(family: str) -> None:
    case = TransformerCase(family, "training", 2, 5, 16, 2, dropout=0.5)
    work = make(case)
    gates = run.Gates(work)
    for name in ("fusedseq", "torch"):
        one = runner(name, work)
        first, second = (one.call() for _ in range(2))
        assert isinstance(first, dict)
        assert isinstance(second, dict)
        assert not torch.equal(first["y"], second["y"])
        assert torch.equal(one.results()["y"], one.results()["y"])
        assert gates.judge(one).wrong is None
    outcome = runner("torch", work).results()
    for name in outcome:  # a gradient that is left out, or a bias that is not added, shows
        assert gates.judge(Runner(one.call, lambda name=name: {**outcome, name: outcome[name] * 0.99},
                                  judged_by=one.judged_by)).wrong  # fmt: skip


def test_results_without_a_kind_are_recurrent() -> None:
    values = {"family": "LSTM", "mode": "inference", "B": 2, "T": 3, "I": 4, "H": 8, "dtype": "float32"}
    assert str(Case.of(values)) == "LSTM inference B2 T3 I4 H8"
    assert not takes("flex", Case.of(values))
    assert takes("flex", SMALL[0])


def beside(case: Case, name: str, ratio: float, peer: str = "torch") -> results.CaseResult:
    """A made-up result in which a peer takes `ratio` times as long as ours."""
    timed = {"fusedseq": 1.0, "torch": max(ratio, 50.0), peer: ratio}
    both = {one: results.PeerResult.of(summary([seconds] * 5), 1e-7) for one, seconds in timed.items()}
    return results.CaseResult(
        case, [name], 2, both, "cpu", case.operations(), case.compulsory_bytes(), 1e11, ["torch", "eager", "flex"]
    )  # fmt: skip


def test_goals_are_geometric_and_against_the_fastest_peer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    full = [case for case in SETS["attention-full"].make() if case.mode == "inference"][:2]
    window = [case for case in SETS["attention-window"].make() if case.mode == "training"]
    found = [beside(full[0], "attention-full", 0.8, "eager"), beside(full[1], "attention-full", 3.2)]
    found += [beside(case, "attention-window", 8.0, "flex") for case in window]
    found += [two_peers(1.0, 0.5)]  # of a set without a goal
    first, second = goals.rows(found)
    assert (first.name, first.unit, first.halves.keys()) == ("attention-full", "", {"inference"})
    half = first.halves["inference"]
    assert (half.cases, half.mean, half.least) == (2, pytest.approx(1.6), pytest.approx(0.8))
    assert (half.goal, half.met) == (1.1, True)
    half = second.halves["training"]  # 8 over 16 and over 64
    assert (half.mean, half.least, half.met) == (pytest.approx(0.25), pytest.approx(0.125), False)

    results.save(made_run(*found[:1]), tmp_path / "a.json")
    results.save(made_run(*found[1:]), tmp_path / "b.json")
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert bench(["goals", *files, "--csv", str(tmp_path / "all.csv")]) == 0
    printed = capsys.readouterr().out
    assert "1.60 (0.80), >= 1.1: met" in printed
    assert "0.25 (0.12) L/W, >= 0.6: missed" in printed
    assert f"slower than eager: {full[0]}: 0.80x" in printed
    assert "LSTM" not in printed
    with (tmp_path / "all.csv").open() as file:
        assert len({row["case"] for row in csv.DictReader(file)}) == len(found)
    results.save(made_run(two_peers(1.0, 2.0)), tmp_path / "c.json")
    assert bench(["goals", str(tmp_path / "c.json")]) == 2
    assert "no case of a set with a goal" in capsys.readouterr().err


def test_of_a_case_in_several_results_the_last_counts() -> None:
    case = next(iter(SETS["attention-full"].make()))
    merged = results.merge([made_run(beside(case, "attention-full", r)) for r in (2.0, 3.0)])
    assert [one.ratio("torch") for one in merged.results] == [3.0]


def test_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grown = [beside(case, "scaling-L", 2.0) for case in SETS["scaling-L"].make()]
    layer = next(iter(SETS["encoder-layer"].make()))
    results.save(made_run(*grown, beside(layer, "encoder-layer", 1.4)), tmp_path / "r.json")
    assert bench(["plot", str(tmp_path / "r.json"), "--out", str(tmp_path / "p")]) == 0
    names = {f"{name}.{kind}" for name in ("speedup", "roofline", "scaling-L") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "p").iterdir()} == names
    assert str(layer) in (tmp_path / "p" / "speedup.svg").read_text()


def test_memory_is_measured_and_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(memory, "PROCESSES", 1)
    chosen = ["--set", "attention-memory", "--case", "L1024 E64", "--peers", "fusedseq", "eager"]
    assert bench(["memory", *chosen, "--out", str(tmp_path), "--json", str(tmp_path / "m.json")]) == 0
    found = json.loads((tmp_path / "m.json").read_text())["memory"]
    sizes = {(one["peer"], one["case"]["dropout"]): one["bytes"] for one in found}
    assert len(sizes) == 4
    logits = 4 * 1024**2 * 4
    assert all(size < logits for (peer, _), size in sizes.items() if peer == "fusedseq")
    assert all(size > 2 * logits for (peer, _), size in sizes.items() if peer == "eager")
    drawn = (tmp_path / "memory.svg").read_text()
    assert "dropout 0.1" in drawn
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_memory_that_cannot_be_measured_has_a_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chosen = ["--set", "smoke", "--case", "attention training B2 H2 L6 E8 dropout0.1", "--peers", "flex"]
    assert bench(["memory", *chosen]) == 2
    assert "FlexAttention has no dropout" in capsys.readouterr().out
    assert bench(["memory", "--set", "cells", "--out", str(tmp_path)]) == 2
    assert "expected cases of attention" in capsys.readouterr().err


def test_the_table_has_a_transformer() -> None:
    sizes = table.Sizes(B=2, T=3, I=2, H=8, layers=2)
    assert table.parity("Transformer", sizes) is None
    training = table.Training("Transformer", "fusedseq", sizes)
    layer: Any = training.module.backbone.layers[1]
    assert isinstance(layer, fusedseq.TransformerEncoderLayer)
    training.outcome()
    assert (layer.dropout.p, layer.self_attn.dropout) == (table.DROPOUT, table.DROPOUT)


def test_kernels_of_a_gpu_are_peers_there_only() -> None:
    work = small(SMALL[0])
    for name in ("flash", "cudnn-attention", "efficient"):
        built = build(name, work)
        assert isinstance(built, Refusal) and "GPUs only" in built.reason


def test_rates_are_told_for_gpus() -> None:
    case = next(iter(SETS["attention-gpu"].make())).but(dtype="bfloat16", device="cuda")
    peers = {"fusedseq": results.PeerResult.of(summary([1e-3, 1e-3]), 0.0), "flash": results.PeerResult("refused")}
    found = results.CaseResult(case, ["attention-gpu"], 1, peers, "triton", case.operations(), 1, 0.0, ["flash"])
    assert report._rates(found) == f"TFLOP/s: fusedseq {case.operations() / 1e9:.3g}"
