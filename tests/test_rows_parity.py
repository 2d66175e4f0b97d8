"""layer_norm and bias_activation on every backend, dtype and ISA against the float64 truth."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fusedseq
from fusedseq import registry
from fusedseq.ops import bias_activation, layer_norm
from fusedseq.reference.dropout import dropout_scale
from fusedseq.testing import DTYPES, device_of
from fusedseq.testing.cases import short
from fusedseq.testing.compare import judge
from fusedseq.testing.row_cases import CASES, RowCase, check_rows, evaluate_rows, make_rows, row_baseline

RUN: Any = {"layer_norm": layer_norm.run, "bias_activation": bias_activation.run}
BACKENDS = tuple(registry.backends())
ROWS = [
    pytest.param(backend, case, dtype, id=f"{backend}-{short(dtype)}-{case.text}")
    for dtype in DTYPES.values()
    for case in CASES
    for backend in BACKENDS
]
TILES = RowCase("layer_norm-67x128-residual-weight-bias-dropout-sum-sliced")


def refusal(backend: str, case: RowCase, dtype: torch.dtype) -> str | None:
    module = registry.backends()[backend]
    return module.missing() or module.supports(
        registry.row_call(case.op, make_rows(case, dtype, device_of(backend)).problem)
    )


@pytest.mark.parametrize(("backend", "case", "dtype"), ROWS)
def test_row_parity(backend: str, case: RowCase, dtype: torch.dtype, ran: set[tuple[str, str, torch.dtype]]) -> None:
    reason = refusal(backend, case, dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with fusedseq.use_backend(backend), registry.record() as choices:
        check_rows(RUN[case.op], case, dtype, device_of(backend))
    used = {(choice.call.cell, choice.backend, choice.call.dtype) for choice in choices}
    assert used == {(case.op, backend, dtype)}
    ran |= used


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_isa(dtype: torch.dtype) -> None:
    _cpu = pytest.importorskip("fusedseq._cpu", reason="no compiled core")
    before = _cpu.isa()
    try:
        for isa in _cpu.isas():
            _cpu.set_isa(isa)
            with fusedseq.use_backend("cpu"):
                for case in CASES:
                    try:
                        check_rows(RUN[case.op], case, dtype)
                    except AssertionError as error:
                        raise AssertionError(f"{isa}: {error}") from error
    finally:
        _cpu.set_isa(before)


@pytest.mark.parametrize("text", [TILES.text, "bias_activation-67x128-bias-relu-dropout-sliced"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_measure_rejects_what_is_wrong(text: str, dtype: torch.dtype) -> None:
    inputs, truth, peer = row_baseline(RowCase(text), dtype)
    good = evaluate_rows(RUN[inputs.case.op], inputs)
    for name, t in good.items():
        for spoil in (lambda t: t * 1.1, lambda t: t.roll(1, -1), lambda t: t * float("nan")):
            errors = judge(good | {name: spoil(t)}, truth, peer, dtype, 128)
            assert not all(error.ok for error in errors), name


@pytest.mark.parametrize("case", [c for c in CASES if c.shape[-1] > 60 and c.shape[0]], ids=lambda c: c.text)
def test_results_depend_on_neither_threads_nor_other_rows(case: RowCase) -> None:
    inputs = make_rows(case, torch.float32)
    together = evaluate_rows(RUN[case.op], inputs)
    torch.set_num_threads(1)
    try:
        alone = evaluate_rows(RUN[case.op], inputs)
    finally:
        torch.set_num_threads(2)
    for name, t in together.items():
        assert torch.equal(t, alone[name]), name
    first = {
        name: t[:2] if isinstance(t, torch.Tensor) and t.shape == case.shape else t
        for name, t in inputs.problem._asdict().items()
    }
    part = evaluate_rows(
        RUN[case.op], inputs._replace(problem=type(inputs.problem)(**first), upstream=[t[:2] for t in inputs.upstream])
    )
    for name, t in part.items():
        if name not in ("dweight", "dbias"):
            assert torch.equal(t, together[name][:2]), name


def test_dropout_bits() -> None:
    # One mask whatever the operator, backend and dtype; kept with the frequency asked for.
    x = torch.ones(500, 200)
    seed = torch.tensor(-3)
    mask = dropout_scale(x.shape, 0.25, seed, torch.float32)
    assert abs((mask == 0).double().mean().item() - 0.25) < 0.01
    assert torch.equal(fusedseq.bias_activation_dropout(x, dropout_p=0.25, seed=-3), mask)
    _, total = fusedseq.residual_dropout_layer_norm(x.double(), dropout_p=0.25, seed=seed, return_sum=True)
    assert torch.equal(total != 0, mask != 0)
    assert not torch.equal(fusedseq.bias_activation_dropout(x, dropout_p=0.25, seed=4), mask)
    torch.manual_seed(0)
    first = fusedseq.bias_activation_dropout(x, dropout_p=0.25)
    assert not torch.equal(first, fusedseq.bias_activation_dropout(x, dropout_p=0.25))
    torch.manual_seed(0)
    assert torch.equal(first, fusedseq.bias_activation_dropout(x, dropout_p=0.25))


def test_not_a_number_and_infinity() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 1.0]], requires_grad=True)
    # torch's vector code says that gelu(inf) is NaN.
    functions = {"relu": torch.relu, "silu": torch.nn.functional.silu}
    assert fusedseq.bias_activation_dropout(x, activation="gelu")[0, 1] == float("inf")
    for name, function in functions.items():
        got, want = fusedseq.bias_activation_dropout(x, activation=name), function(x)
        torch.testing.assert_close(got, want, equal_nan=True)
        grads = (torch.autograd.grad(t, x, torch.ones_like(x))[0] for t in (got, want))
        if name == "relu":
            torch.testing.assert_close(*grads, equal_nan=True)
    rows = torch.randn(3, 70)
    rows[1, 4] = float("nan")
    out = fusedseq.residual_dropout_layer_norm(rows)
    assert out[1].isnan().all() and out[::2].isfinite().all()


@pytest.mark.last
def test_every_row_operator_advertised_ran(
    request: pytest.FixtureRequest, ran: set[tuple[str, str, torch.dtype]]
) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("each xdist worker sees a part of the tests only: run without -n")
    selected = sum(getattr(item, "originalname", "") == "test_row_parity" for item in request.session.items)
    if selected < len(ROWS):
        pytest.skip(f"only {selected} of {len(ROWS)} parity rows were selected")
    advertised = {
        (op, backend, dtype)
        for op in RUN
        for backend in BACKENDS
        for dtype in DTYPES.values()
        if refusal(backend, next(c for c in CASES if c.op == op), dtype) is None
    }
    never = sorted((op, backend, short(dtype)) for op, backend, dtype in advertised - ran)
    assert not never, f"advertised, but no parity row of theirs passed: {never}"
