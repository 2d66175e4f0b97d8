"""Random configurations that no list of cases would name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedseq
from fusedseq.ops import scan
from fusedseq.testing import Case, check, cpu_backends, evaluate, make_inputs
from fusedseq.testing.cases import CELLS, VIEWS

BACKENDS = cpu_backends()
# Examples differ in cost by more than a deadline should; the fixtures set global state only and may be shared.
relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def any_case(draw: st.DrawFn, cells: tuple[str, ...] = CELLS, max_h: int = 70) -> Case:
    cell = draw(st.sampled_from(cells))
    layout = draw(st.sampled_from(["dense", "lengths", "lengths0", "packed"]))
    # Lengths and packed rows exist only where there is something to be long.
    least = 0 if layout == "dense" else 1
    H = draw(st.integers(1, max_h))
    return Case(
        cell=cell,
        T=draw(st.integers(least, 9)),
        B=draw(st.integers(least, 14)),
        I=draw(st.integers(0, 40)),
        H=H,
        proj=draw(st.sampled_from([0, max(1, H // 2)])) if cell == "lstm" and H > 1 else 0,
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()) and layout != "packed",
        bias=draw(st.booleans()),
        layout=layout,
        resets=draw(st.booleans()),
        cells=draw(st.booleans()) and cell == "lstm",
        state=draw(st.booleans()),
        view=draw(st.sampled_from(VIEWS)),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
@relaxed
@given(case=any_case(), seed=st.integers(0, 1000))
def test_parity_of_any_case(backend: str, dtype: torch.dtype, case: Case, seed: int) -> None:
    with fusedseq.use_backend(backend):
        check(scan, case, dtype, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@relaxed
@given(case=any_case(max_h=20), cut=st.integers(0, 9))
def test_a_scan_can_be_continued(backend: str, case: Case, cut: int) -> None:
    """Two scans, the second from the states of the first, are one: what a streaming user relies on."""
    case = Case(
        case.cell, case.T, case.B, case.I, case.H, case.proj, bias=case.bias, state=case.state, cells=case.cells
    )
    cut = min(cut, case.T)
    inputs = make_inputs(case, torch.float64)
    weights, keywords = inputs.weights, inputs.keywords()
    with fusedseq.use_backend(backend):
        y, h_n, c_n, c_all = scan(case.cell, inputs.x, inputs.h0, inputs.c0, weights, **keywords)
        head = scan(case.cell, inputs.x[:cut], inputs.h0, inputs.c0, weights, **keywords)
        tail = scan(case.cell, inputs.x[cut:], head[1], head[2], weights, **keywords)
    torch.testing.assert_close(torch.cat([head[0], tail[0]]), y)
    torch.testing.assert_close(tail[1], h_n)
    if case.cell == "lstm":
        torch.testing.assert_close(tail[2], c_n)
    if case.cells:
        torch.testing.assert_close(torch.cat([head[3], tail[3]]), c_all)


@pytest.mark.parametrize("backend", BACKENDS)
@relaxed
@given(case=any_case(max_h=20), order=st.randoms(use_true_random=False))
def test_rows_may_be_reordered(backend: str, case: Case, order: object) -> None:
    """Permuting the batch permutes the results; the gradients of the weights stay what they are."""
    layout = "dense" if case.layout == "packed" else case.layout
    case = Case(
        case.cell, case.T, case.B, case.I, case.H, case.proj, case.bidirectional, bias=case.bias, layout=layout,
        resets=case.resets, cells=case.cells,
    )  # fmt: skip
    perm = list(range(case.B))
    order.shuffle(perm)
    inputs, moved = (make_inputs(case, torch.float64) for _ in range(2))
    moved.x, moved.h0 = inputs.x[:, perm], inputs.h0[:, perm]
    moved.c0 = None if inputs.c0 is None else inputs.c0[:, perm]
    moved.lengths = None if inputs.lengths is None else inputs.lengths[perm]
    moved.resets = None if inputs.resets is None else inputs.resets[:, perm]
    moved.upstream = {name: g[:, perm] for name, g in inputs.upstream.items()}
    with fusedseq.use_backend(backend):
        want, got = evaluate(scan, inputs), evaluate(scan, moved)
    for name, t in want.items():
        row_wise = not name.startswith(("dw", "db"))
        torch.testing.assert_close(got[name], t[:, perm] if row_wise else t, rtol=1e-9, atol=1e-11)
