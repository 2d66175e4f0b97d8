"""Every backend against the float64 truth: outputs, states and the gradient of every input, for each kind of call.

The rows come from the registry and from `fusedseq.testing.cases`; a new backend or case is a row more, not a file.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

import fusedseq
from fusedseq import registry
from fusedseq.ops import scan
from fusedseq.testing import DTYPES, Case, baseline, cases, check, device_of, evaluate, judge, make_inputs
from fusedseq.testing.cases import CELLS, GATES, Inputs, short

BACKENDS = tuple(registry.backends())
ROWS = [
    pytest.param(backend, case, dtype, id=f"{backend}-{case.id(dtype)}")
    for cell in CELLS
    for dtype in DTYPES.values()
    # One case at a time through all backends: its truth is then computed once.
    for case in cases(cell, dtype)
    for backend in BACKENDS
]


def call_of(case: Case, dtype: torch.dtype, device: str) -> registry.ScanCall:
    return registry.ScanCall(
        cell=case.cell, device=device, dtype=dtype, T=case.T, B=case.B, I=case.I, H=case.H, R=case.R, D=case.D,
        packed=case.layout == "packed", lengths=case.layout.startswith("lengths"), resets=case.resets,
        cells=case.cells, grad=True,
    )  # fmt: skip


def refusal(backend: str, case: Case, dtype: torch.dtype) -> str | None:
    module = registry.backends()[backend]
    return module.missing() or module.supports(call_of(case, dtype, device_of(backend)))


def skip_if_refused(backend: str, case: Case, dtype: torch.dtype) -> None:
    reason = refusal(backend, case, dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize(("backend", "case", "dtype"), ROWS)
def test_parity(backend: str, case: Case, dtype: torch.dtype, ran: set[tuple[str, str, torch.dtype]]) -> None:
    skip_if_refused(backend, case, dtype)
    with fusedseq.use_backend(backend), registry.record() as choices:
        check(scan, case, dtype, device_of(backend))
    used = {(choice.call.cell, choice.backend, choice.call.dtype) for choice in choices}
    assert used == {(case.cell, backend, dtype)}
    ran |= used


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_subset_of_outputs_may_be_used(backend: str, cell: str) -> None:
    """A loss on some outputs only: the others hand no gradient in, which must mean zero."""
    case = Case.parse(cell, "T5B4I3H9-bi-lengths0-resets-cells")
    skip_if_refused(backend, case, torch.float32)
    base = baseline(case, torch.float32)
    placed = make_inputs(case, torch.float32, device_of(backend))
    for only in ([name] for name in base.inputs.upstream):
        truth = evaluate(fusedseq.reference.scan.forward, base.inputs.to(torch.float64), only=only)
        peer = evaluate(fusedseq.reference.scan.forward, base.inputs, only=only)
        with fusedseq.use_backend(backend):
            outcome = evaluate(scan, placed, only=only)
        wrong = [str(error) for error in judge(outcome, truth, peer, torch.float32) if not error.ok]
        assert not wrong, f"gradient of {only} alone: {wrong}"


def _gradients(inputs: Inputs, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The gradients of `wanted` inputs, none of the others requiring one."""
    named = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0} | dict(
        zip(inputs.weight_names(), inputs.weights, strict=True)
    )
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in named.items() if t is not None}
    weights = [leaves[name] for name in inputs.weight_names()]
    outputs = scan(inputs.case.cell, leaves["x"], leaves["h0"], leaves.get("c0"), weights, **inputs.keywords())
    names = ("y", "h_n", "c_n", "c_all")
    pairs = [(t, inputs.upstream[name]) for name, t in zip(names, outputs, strict=True) if t is not None]
    heads, up = zip(*pairs, strict=True)
    torch.autograd.backward(heads, up)
    assert all(t.grad is None for name, t in leaves.items() if name not in wanted)
    return {name: leaves[name].grad for name in wanted}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_inputs_change_no_other_gradient(backend: str, cell: str) -> None:
    case = Case.parse(cell, "T4B5I6H11-bi-packed-proj4")
    skip_if_refused(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, device_of(backend))
    every = {"x", "h0", *(["c0"] if cell == "lstm" else []), *inputs.weight_names()}
    with fusedseq.use_backend(backend):
        full = _gradients(inputs, every)
        for wanted in ({"x"}, {"h0"}, set(inputs.weight_names()), {"w_hh"}, every - {"x"}):
            for name, grad in _gradients(inputs, wanted).items():
                assert torch.equal(grad, full[name]), f"{name} differs when only {sorted(wanted)} require a gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_gives_the_same_outputs(backend: str) -> None:
    for cell in CELLS:
        case = Case.parse(cell, "T6B5I4H19-bi-lengths0-resets-cells")
        skip_if_refused(backend, case, torch.float32)
        inputs = make_inputs(case, torch.float32, device_of(backend))
        with fusedseq.use_backend(backend):
            trained = evaluate(scan, inputs)
            with torch.no_grad():
                args = (inputs.x, inputs.h0, inputs.c0, inputs.weights)
                outputs = dict(zip(("y", "h_n", "c_n", "c_all"), scan(cell, *args, **inputs.keywords()), strict=True))
        for name in inputs.upstream:
            assert not outputs[name].requires_grad
            assert torch.equal(outputs[name], trained[name]), f"{cell}: {name} depends on whether gradients are kept"


def test_cases_meet_pairwise() -> None:
    """Every value of one option occurs together with every value of each other option."""
    features = {
        "directions": lambda c: c.D,
        "batch_first": lambda c: c.batch_first,
        "bias": lambda c: c.bias,
        "projection": lambda c: c.proj > 0,
        "layout": lambda c: c.layout,
        "resets": lambda c: c.resets,
        "cells": lambda c: c.cells,
        "states": lambda c: c.state,
        "view": lambda c: c.view,
    }
    filled = [case for case in cases("lstm", torch.float32) if case.T and case.B]
    for one, other in ((a, b) for a in features for b in features if a < b):
        met = {(features[one](c), features[other](c)) for c in filled}
        firsts, seconds = ({features[name](c) for c in filled} for name in (one, other))
        # batch_first means nothing to packed rows.
        apart = {(True, "packed")} if (one, other) == ("batch_first", "layout") else set()
        assert {(a, b) for a in firsts for b in seconds} - met == apart, (one, other)


def test_the_measure_rejects_what_is_wrong() -> None:
    """The tolerance passes rounding and nothing else, or all the rows above mean little."""
    for dtype in DTYPES.values():
        case = Case.parse("gru", "T5B4I3H9-bi")
        base = baseline(case, dtype)
        good = evaluate(fusedseq.reference.scan.forward, base.inputs)
        grade = functools.partial(judge, truth=base.truth, peer=base.peer, dtype=dtype)
        assert all(error.ok for error in grade(good)), short(dtype)
        for name, t in good.items():
            for spoil in (lambda t: t * 1.05, lambda t: t.roll(1, -1), lambda t: t * float("nan")):
                assert not all(error.ok for error in grade(good | {name: spoil(t)})), f"{short(dtype)} {name}"
            with pytest.raises(AssertionError, match="shape"):
                grade(good | {name: t.unsqueeze(0)})
            with pytest.raises(AssertionError, match="expected"):
                grade(good | {name: t.to(torch.complex64)})


def advertised() -> set[tuple[str, str, torch.dtype]]:
    """What the usable backends say they take, asked of a plain call of ordinary size."""
    return {
        (cell, backend, dtype)
        for cell in GATES
        for backend in BACKENDS
        for dtype in DTYPES.values()
        if refusal(backend, Case(cell, 4, 3, 8, 16), dtype) is None
    }


@pytest.mark.last
def test_everything_advertised_ran(request: pytest.FixtureRequest, ran: set[tuple[str, str, torch.dtype]]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("each xdist worker sees a part of the tests only: run without -n")
    selected = sum(getattr(item, "originalname", "") == "test_parity" for item in request.session.items)
    if selected < len(ROWS):
        pytest.skip(f"only {selected} of {len(ROWS)} parity rows were selected")
    never = sorted((cell, backend, short(dtype)) for cell, backend, dtype in advertised() - ran)
    assert not never, f"advertised, but no parity row of theirs passed: {never}"
