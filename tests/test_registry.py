"""The choice of a backend: by priority, by name, remembered, reported, and never a silent fallback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import timeit
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fusedseq
from fusedseq import config, ops, registry
from fusedseq.registry import BackendError, FallbackWarning, ScanCall, use_backend
from fusedseq.testing.cases import CELLS, Case, make_inputs

CALL = ScanCall("lstm", "cpu", torch.float32, 3, 2, 4, 5, 5, 1, False, False, False, False, False)


class Rows:
    """Stand-ins for the backends: `fast` before `slow`, each with a reason to be missing or to refuse."""

    def __init__(self) -> None:
        self.missing: dict[str, str | None] = {"fast": None, "slow": None}
        self.refuses: dict[str, str | None] = {"fast": None, "slow": None}
        self.asked: list[str] = []

    def module(self, name: str) -> Any:
        def supports(call: ScanCall) -> str | None:
            self.asked.append(name)
            return self.refuses[name]

        return SimpleNamespace(name=name, missing=lambda: self.missing[name], supports=supports)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rows]:
    rows = Rows()
    monkeypatch.setattr(registry, "_modules", {name: rows.module(name) for name in ("fast", "slow")})
    registry._decisions.clear()
    registry._warned.clear()
    yield rows
    registry._decisions.clear()
    registry._warned.clear()


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "settings", config.Settings(strict=True))


def names_of(calls: list[registry.Choice]) -> list[str]:
    return [choice.backend for choice in calls]


def test_every_backend_keeps_the_contract() -> None:
    assert list(registry.backends()) == list(config.BACKENDS)
    for name, module in registry.backends().items():
        assert isinstance(module, ModuleType)
        assert module.name == name
        assert module.missing() is None or isinstance(module.missing(), str)
        for function in ("supports", "scan_forward", "scan_backward"):
            assert callable(getattr(module, function))
    assert registry.backends()["reference"].missing() is None


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_reference_takes_every_call(cell: str, dtype: torch.dtype) -> None:
    with use_backend("reference"):
        assert registry.choose(CALL._replace(cell=cell, dtype=dtype)).name == "reference"


def test_priority_and_fallback_warns_once(rows: Rows) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose(CALL).name == "fast"
    rows.refuses["fast"] = "it dislikes T=4"
    with pytest.warns(FallbackWarning, match="'slow' because 'fast': it dislikes T=4"):
        assert registry.choose(CALL._replace(T=4)).name == "slow"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose(CALL._replace(T=5)).name == "slow"
    rows.missing["fast"] = "not built"
    with pytest.warns(FallbackWarning, match="not usable: not built"):
        assert registry.choose(CALL._replace(T=6)).name == "slow"


def test_a_backend_for_another_device_is_no_fallback(rows: Rows, strict: None) -> None:
    registry._modules["fast"].device = "cuda"
    registry._modules["slow"].device = "cpu"
    choice = registry._decide("", CALL)
    assert choice.backend == "slow"
    assert choice.passed_over == {"fast": "it is for tensors on cuda, these are on cpu"}
    with use_backend("fast"):
        assert registry.choose(CALL).name == "fast"
    rows.refuses["slow"] = "too wide"
    with pytest.raises(BackendError, match=r"no backend takes .*'fast': it is for tensors on cuda.*'slow': too wide"):
        registry.choose(CALL._replace(H=9))


def test_a_backend_for_any_device_is_one(rows: Rows, strict: None) -> None:
    registry._modules["fast"].device = "cuda"
    with pytest.raises(BackendError, match="would fall back to 'slow' because 'fast': it is for tensors on cuda"):
        registry.choose(CALL)


def test_nobody_takes_the_call(rows: Rows) -> None:
    rows.refuses = {"fast": "too long", "slow": "too wide"}
    with pytest.raises(
        BackendError, match=r"no backend takes lstm cpu float32 T=3 .*'fast': too long; 'slow': too wide"
    ):
        registry.choose(CALL)


def test_strict_forbids_the_fallback(rows: Rows, strict: None) -> None:
    assert registry.choose(CALL).name == "fast"
    rows.refuses["fast"] = "too long"
    for _ in range(2):  # an error is not a decision: it is raised each time
        with pytest.raises(BackendError, match=r"FUSEDSEQ_STRICT: lstm .* 'fast': too long"):
            registry.choose(CALL._replace(T=9))
    with use_backend("slow"):
        assert registry.choose(CALL._replace(T=9)).name == "slow"


def test_a_named_backend_succeeds_or_raises(rows: Rows) -> None:
    with use_backend("slow"):
        assert registry.choose(CALL).name == "slow"
    rows.refuses["slow"] = "too wide"
    with (
        use_backend("slow"),
        pytest.raises(BackendError, match=r"'slow' was asked for by name but refuses lstm .*too wide"),
    ):
        registry.choose(CALL._replace(H=9))
    rows.missing["fast"] = "not built"
    with pytest.raises(BackendError, match="'fast' was asked for by name but is not usable: not built"):
        use_backend("fast")
    with pytest.raises(ValueError, match=r"backend: expected one of .*reference.*, got 'warp'"):
        use_backend("warp")
    assert registry.forced() == ""


def test_use_backend_nests_restores_and_can_be_plain(rows: Rows) -> None:
    with use_backend("slow"):
        with use_backend("fast"):
            assert registry.choose(CALL).name == "fast"
            with use_backend(None):
                assert registry.forced() == ""
        assert registry.choose(CALL).name == "slow"
        with pytest.raises(KeyError), use_backend("fast"):
            raise KeyError
        assert registry.forced() == "slow"
    assert registry.forced() == ""
    use_backend("slow")
    try:
        assert registry.choose(CALL).name == "slow"
    finally:
        use_backend(None)
    assert registry.choose(CALL).name == "fast"


def test_a_context_object_can_be_entered_later_and_again(rows: Rows) -> None:
    context = use_backend("slow")
    use_backend(None)
    for _ in range(2):
        with context:
            assert registry.forced() == "slow"
        assert registry.forced() == ""


def test_use_backend_stays_in_its_thread(rows: Rows) -> None:
    seen: list[str] = []
    with use_backend("slow"):
        thread = threading.Thread(target=lambda: seen.append(registry.choose(CALL).name))
        thread.start()
        thread.join()
    assert seen == ["fast"]


def test_a_decision_is_made_once(rows: Rows) -> None:
    for _ in range(3):
        registry.choose(CALL)
    registry.choose(CALL._replace(T=7))
    assert rows.asked == ["fast", "fast"]


def test_the_cache_is_bounded(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CACHE_LIMIT", 10)
    for T in range(100):
        registry.choose(CALL._replace(T=T))
        assert len(registry._decisions) <= 10


def test_a_remembered_choice_is_cheap(rows: Rows) -> None:
    registry.choose(CALL)
    # The bound is ten times what it takes, since test machines are busy; machinery on this path would show anyway.
    assert min(timeit.repeat(lambda: registry.choose(CALL), number=1000, repeat=20)) / 1000 < 5e-6


def test_scan_call_equals_its_constructor() -> None:
    call = registry.scan_call("lstm", torch.zeros(3, 2, 4), (3, 2, 4, 5, 5, 1), None, None, None, False, False)
    assert isinstance(call, ScanCall)
    assert call == CALL


def test_hooks_and_record(rows: Rows) -> None:
    with registry.record() as ran:
        registry.choose(CALL)
        with use_backend("slow"):
            registry.choose(CALL)
    registry.choose(CALL)
    assert {(c.call.cell, c.backend, c.call.dtype) for c in ran} == {
        ("lstm", n, torch.float32) for n in ("fast", "slow")
    }
    assert names_of(ran) == ["fast", "slow"]
    assert registry._hooks == ()


def test_explain() -> None:
    inputs = make_inputs(Case.parse("lstm", "T3B2I4H5"), torch.float32)

    def model(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            ops.scan("lstm", x, None, None, inputs.weights)
        return ops.cell("lstm", x[0], None, None, inputs.weights)[0]

    with use_backend("reference"):
        report = fusedseq.explain(model, inputs.x)
    assert report.backends == {"reference"}
    assert len(report.calls) == 3
    assert report.output.shape == (2, 5)
    text = repr(report)
    assert "model: 3 operator calls" in text
    assert "lstm cpu float32 T=3 B=2 I=4 H=5 R=5 D=1 -> reference (x2)" in text


def test_explain_gives_the_reasons(rows: Rows) -> None:
    rows.refuses["fast"] = "it dislikes T=3"
    with pytest.warns(FallbackWarning):
        report = registry.explain(registry.choose, CALL)
    assert "-> slow\n    not fast: it dislikes T=3" in repr(report)


def test_backward_uses_the_backend_of_forward() -> None:
    inputs = make_inputs(Case.parse("gru", "T3B2I4H5"), torch.float64)
    inputs.x.requires_grad_()
    with use_backend("reference"):
        y = ops.scan("gru", inputs.x, None, None, inputs.weights)[0]
    with registry.record() as ran:
        (grad,) = torch.autograd.grad(y.sum(), inputs.x, create_graph=True)
    assert set(names_of(ran)) == {"reference"}
    assert grad.requires_grad


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, config.Settings()),
        ({"FUSEDSEQ_BACKEND": "", "FUSEDSEQ_STRICT": "", "FUSEDSEQ_ISA": "auto"}, config.Settings()),
        ({"FUSEDSEQ_BACKEND": " Reference "}, config.Settings(backend="reference")),
        ({"FUSEDSEQ_STRICT": "1", "FUSEDSEQ_ISA": "avx2"}, config.Settings(strict=True, isa="avx2")),
        ({"FUSEDSEQ_SCRATCH_MB": "7"}, config.Settings(scratch_mb=7)),
        ({"FUSEDSEQ_STRICT": "off"}, config.Settings()),
    ],
)
def test_environment(environ: dict[str, str], expected: config.Settings) -> None:
    assert config.load(environ) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FUSEDSEQ_BACKEND", "warp", "cpu, .*reference or auto"),
        ("FUSEDSEQ_STRICT", "perhaps", "1 or 0"),
        ("FUSEDSEQ_ISA", "sse9", "baseline, avx2"),
        ("FUSEDSEQ_SCRATCH_MB", "-1", "whole number"),
    ],
)
def test_environment_errors(name: str, value: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .*{expected}.*got '{value}'"):
        config.load({name: value})


def test_reload_reads_the_environment_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDSEQ_BACKEND", "reference")
    try:
        registry.reload()
        assert registry.choose(CALL).name == "reference"
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(registry.forced()))
        thread.start()
        thread.join()
        assert seen == ["reference"]
    finally:
        monkeypatch.undo()
        registry.reload()


def test_environment_in_a_new_process() -> None:
    code = "import fusedseq; print(fusedseq.registry.forced(), fusedseq.config.settings.strict)"
    environ = {**os.environ, "FUSEDSEQ_BACKEND": "reference", "FUSEDSEQ_STRICT": "1"}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["reference", "True"]


def test_every_variable_is_documented() -> None:
    root = Path(__file__).parents[1]
    table = (root / "ENVS.md").read_text()
    source = Path(config.__file__).read_text()
    for name in set(re.findall(r"FUSEDSEQ_[A-Z_]*[A-Z]", source)):
        assert f"`{name}`" in table
    for path in Path(fusedseq.__file__).parent.rglob("*.py"):
        assert path == Path(config.__file__) or "os.environ" not in path.read_text(), path
