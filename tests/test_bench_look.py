"""The quick look at a GPU, as far as a machine without one allows: small cases on the CPU, and the list."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedseq.bench import device_look
from fusedseq.bench.attention_cases import AttentionCase
from fusedseq.bench.rnn_cases import RecurrentCase


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (RecurrentCase("GRU", "training", 2, 5, 3, 4), ["fusedseq", "torch", "triton"]),
        (
            AttentionCase("attention", "training", 1, 2, 12, 8, window=4, global_keys=2),
            ["fusedseq", "torch", "cuda-mma"],
        ),
    ],
    ids=str,
)
def test_times_distances_and_refusals(case: RecurrentCase | AttentionCase, names: list[str]) -> None:
    row = device_look.look(case, 0.02, names)
    assert set(row["seconds"]) == {"fusedseq", "torch"} and all(t > 0 for t in row["seconds"].values())
    assert set(row["refused"]) == {names[2]} and row["refused"][names[2]]
    assert 0 < row["off"]["fusedseq"] < 1e-5 and row["off"]["torch"] == 0
    assert row["backends"]["fusedseq"] == "cpu"


def test_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "look.jsonl"
    assert device_look.main([*device_look.GROUPS, "--out", str(out), "--list"]) == 0
    told = capsys.readouterr().err.splitlines()
    made = [case for group in device_look.GROUPS.values() for case in group()]
    assert told == [str(case) for case in made] and len(set(told)) == len(told)
    assert all(case.device == "cuda" for case in made) and not out.exists()
