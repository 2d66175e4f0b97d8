"""The programs in examples/: torch's modules and ours make the same network there, and the programs run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
MODELS = ("rnn", "lstm", "gru", "transformer", "longformer", "hybrid")


@pytest.fixture
def backbones(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return pytest.importorskip("backbones")


def network(backbones: ModuleType, model: str, module: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return backbones.backbone(model, module, 9, 16, 2, 0.0).double()


@pytest.mark.parametrize("model", MODELS)
def test_backbones_are_the_same_network(backbones: ModuleType, model: str) -> None:
    """Parameters, outputs and gradients; at 40 hours Longformer's window hides some keys, and its last hour none."""
    outcomes = []
    for module in ("torch", "fusedseq"):
        layers = network(backbones, model, module)
        gen = torch.Generator().manual_seed(1)
        x, upstream = (torch.randn(3, 40, n, generator=gen, dtype=torch.float64) for n in (9, 16))
        y = layers(x.requires_grad_())
        names, parameters = zip(*layers.named_parameters(), strict=True)
        outcomes.append((names, *parameters, y, *torch.autograd.grad(y, (x, *parameters), upstream)))
    assert outcomes[0][0] == outcomes[1][0]
    for theirs, ours in zip(outcomes[0][1:], outcomes[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("model", "seen"), [("lstm", (0, 20)), ("transformer", (0, 39)), ("hybrid", (0, 20))])
def test_what_an_hour_sees(backbones: ModuleType, model: str, seen: tuple[int, int]) -> None:
    """The output at hour 20 depends on exactly the hours that the docstrings say."""
    layers = network(backbones, model, "fusedseq")
    x = torch.randn(1, 40, 9, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layers(x)[0, 20, 3], x)
    assert grad[0].any(-1).nonzero().flatten().tolist() == list(range(seen[0], seen[1] + 1))


def test_hidden_must_fit_the_heads(backbones: ModuleType) -> None:
    with pytest.raises(ValueError, match="hidden must be a multiple of the 4 heads, got 18"):
        backbones.backbone("hybrid", "torch", 9, 18, 1, 0.0)


def test_forecast(tmp_path: Path) -> None:
    """The whole program on little: exit code 0 says that the losses of torch and fusedseq agree."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    options = ["--model", "longformer", "--epochs", "1", "--hidden", "8", "--window", "30", "--batch", "512"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "forecast.py"), *options, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "forecast.json").read_text())
    assert [(row["model"], row["module"]) for row in rows[2:]] == [("Longformer", "torch"), ("Longformer", "fusedseq")]
    assert (tmp_path / "forecast.png").stat().st_size > 10_000
    assert "agree" in done.stdout and "torch has no Longformer" in done.stdout


def test_numerals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import numerals

    spelled = {
        0: ("zero", "null"),
        1: ("one", "eins"),
        21: ("twenty one", "einundzwanzig"),
        101: ("one hundred and one", "einhunderteins"),
        1_000: ("one thousand", "eintausend"),
        21_406: ("twenty one thousand four hundred and six", "einundzwanzigtausendvierhundertsechs"),
        701_001: ("seven hundred and one thousand and one", "siebenhunderteintausendeins"),
    }
    for n, (english, german) in spelled.items():
        assert (" ".join(numerals.english(n)), "".join(numerals.german(n))) == (english, german)
    rows = numerals.TARGET.encode([numerals.german(n) for n in spelled])
    assert [numerals.TARGET.decode(row) for row in rows] == [numerals.german(n) for n in spelled]
    learned, unseen = numerals.corpus(500, 200, 0)
    assert len({*learned, *unseen}) == 700 and min(learned) >= 0 and max(learned) < 1_000_000


def test_translation() -> None:
    """Exit code 0 says that the losses of torch and fusedseq agree."""
    pytest.importorskip("tqdm")
    options = ["--steps", "3", "--hidden", "16", "--layers", "1", "--pairs", "200", "--test", "9", "--batch", "32"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "translation.py"), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "agree" in done.stdout and done.stdout.count("->") == 5 and "Warning" not in done.stderr
