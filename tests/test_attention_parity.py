"""Attention on every backend, dtype and ISA against the float64 truth: out, lse and the gradient of every input."""

from __future__ import annotations

import os

import pytest
import torch

import fusedseq
from fusedseq import registry
from fusedseq.ops.attention import run
from fusedseq.testing import DTYPES, device_of
from fusedseq.testing.attention_cases import AttentionCase, attention_cases, make_attention
from fusedseq.testing.attention_compare import attention_baseline, check_attention, evaluate_attention, judge_attention
from fusedseq.testing.cases import short

BACKENDS = tuple(registry.backends())
ROWS = [
    pytest.param(backend, case, dtype, id=f"{backend}-{case.id(dtype)}")
    for dtype in DTYPES.values()
    for case in attention_cases(dtype)
    for backend in BACKENDS
]
PLAIN = AttentionCase("B2H2L9S12E16")


def refusal(backend: str, case: AttentionCase, dtype: torch.dtype) -> str | None:
    module = registry.backends()[backend]
    return module.missing() or module.supports(
        registry.attention_call(make_attention(case, dtype, device_of(backend)).problem, True)
    )


@pytest.mark.parametrize(("backend", "case", "dtype"), ROWS)
def test_attention_parity(
    backend: str, case: AttentionCase, dtype: torch.dtype, ran: set[tuple[str, str, torch.dtype]]
) -> None:
    reason = refusal(backend, case, dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with fusedseq.use_backend(backend), registry.record() as choices:
        check_attention(run, case, dtype, device=device_of(backend))
    used = {(choice.call.cell, choice.backend, choice.call.dtype) for choice in choices}
    assert used == {("attention", backend, dtype)}
    ran |= used


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_isa(dtype: torch.dtype) -> None:
    _cpu = pytest.importorskip("fusedseq._cpu", reason="no compiled core")
    before = _cpu.isa()
    try:
        for isa in _cpu.isas():
            _cpu.set_isa(isa)
            with fusedseq.use_backend("cpu"):
                for case in attention_cases(dtype):
                    try:
                        check_attention(run, case, dtype)
                    except AssertionError as error:
                        raise AssertionError(f"{isa}: {error}") from error
    finally:
        _cpu.set_isa(before)


def test_the_measure_rejects_what_is_wrong() -> None:
    for dtype in DTYPES.values():
        base = attention_baseline(AttentionCase("B2H4K2L9S20E16-causal-bias-sinks-alibi-lse"), dtype)
        good = evaluate_attention(fusedseq.reference.attention.forward, base.inputs)
        assert all(error.ok for error in judge_attention(good, base)), short(dtype)
        for name, t in good.items():
            for spoil in (lambda t: t * 1.1, lambda t: t.roll(1, -1), lambda t: t * float("nan")):
                try:
                    wrong = not all(error.ok for error in judge_attention(good | {name: spoil(t)}, base))
                except AssertionError:
                    wrong = True
                assert wrong, f"{short(dtype)} {name}"


@pytest.mark.last
def test_every_attention_advertised_ran(request: pytest.FixtureRequest, ran: set[tuple[str, str, torch.dtype]]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("each xdist worker sees a part of the tests only: run without -n")
    selected = sum(getattr(item, "originalname", "") == "test_attention_parity" for item in request.session.items)
    if selected < len(ROWS):
        pytest.skip(f"only {selected} of {len(ROWS)} parity rows were selected")
    advertised = {
        ("attention", backend, dtype)
        for backend in BACKENDS
        for dtype in DTYPES.values()
        if refusal(backend, PLAIN, dtype) is None
    }
    never = sorted((op, backend, short(dtype)) for op, backend, dtype in advertised - ran)
    assert not never, f"advertised, but no parity row of theirs passed: {never}"
