"""Single cells on the Triton kernels, and their pointwise part alone: strides, dtypes, what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_formula import check_cell, evaluate, normal, sliced, specification
from torch import Tensor

import fusedseq
from fusedseq import registry
from fusedseq.ops import cell as run_cell
from fusedseq.testing import judge
from fusedseq.testing.cases import CELLS, GATES, short

if (reason := registry.backends()["triton"].missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fusedseq.backends.triton_cell import KEPT, Step, pointwise_backward, pointwise_forward
from fusedseq.reference import gru, lstm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.bfloat16, torch.float16]
# B, I, H: one, odd, more rows than a tile has, more units than fill one; an input without features.
SIZES = [(1, 1, 1), (3, 5, 7), (33, 4, 32), (2, 3, 257), (5, 0, 16)]


@pytest.mark.parametrize("cell", CELLS)
def test_cells_match_the_truth(cell: str) -> None:
    for size in SIZES:
        check_cell("triton", DEVICE, cell, size, torch.float32)
    check_cell("triton", DEVICE, cell, (3, 5, 7), torch.float32, bias=False)
    check_cell("triton", DEVICE, cell, (3, 5, 7), torch.float32, state=False)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.parametrize("cell", CELLS)
def test_cells_of_half_types(cell: str, dtype: torch.dtype) -> None:
    check_cell("triton", DEVICE, cell, (5, 6, 33), dtype)
    check_cell("triton", DEVICE, cell, (4, 3, 8), dtype, state=False)


def test_an_empty_batch() -> None:
    for cell in CELLS:
        check_cell("triton", DEVICE, cell, (0, 3, 4), torch.float32)


def test_the_modules_run_here() -> None:
    x = torch.randn(4, 6, device=DEVICE)
    for name in ("LSTMCell", "GRUCell", "RNNCell"):
        module = getattr(fusedseq, name)(6, 9).to(DEVICE)
        with fusedseq.use_backend("triton"):
            report = fusedseq.explain(module, x)
        assert report.backends == {"triton"}
        want = getattr(torch.nn, name)(6, 9).to(DEVICE)
        want.load_state_dict(module.state_dict())
        torch.testing.assert_close(report.output, want(x))


def test_a_projection_takes_the_scan_of_one_step() -> None:
    weights = [normal(20, 3), normal(20, 2), normal(20), normal(20), normal(2, 5)]
    tensors = {"x": normal(4, 3), "h": normal(4, 2), "c": normal(4, 5)}
    upstream = [normal(4, 2), normal(4, 5)]
    single = [{n: t.float() for n, t in tensors.items()}, [w.float() for w in weights], [g.float() for g in upstream]]
    here = [{n: t.to(DEVICE) for n, t in single[0].items()}, *([t.to(DEVICE) for t in one] for one in single[1:])]
    outcomes = []
    for backend, args in (("triton", here), ("reference", [tensors, weights, upstream]), ("reference", single)):
        with fusedseq.use_backend(backend):
            outcomes.append(evaluate("lstm", *args))
    assert all(error.ok for error in judge(*outcomes, torch.float32, terms=20))


def test_second_derivatives_of_a_saved_step() -> None:
    """The operator's own backward takes up what the cell has saved."""
    cell, B, H = "gru", 3, 4
    x, h = (normal(B, H, seed=i).float().to(DEVICE).requires_grad_() for i in range(2))
    weights = [normal(3 * H, H, seed=2).float().to(DEVICE), normal(3 * H, H, seed=3).float().to(DEVICE)]
    found = []
    for backend in ("triton", "reference"):
        with fusedseq.use_backend(backend):
            new, _ = run_cell(cell, x, h, None, weights)
            (first,) = torch.autograd.grad(new.square().sum(), x, create_graph=True)
            found.append((first.detach(), *torch.autograd.grad(first.square().sum(), (x, h))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=short)
@pytest.mark.parametrize("how", ["dense", "rows", "columns", "expanded"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_pointwise_part_in_any_strides(cell: str, how: str, dtype: torch.dtype) -> None:
    before = cell == "gru_reset_before"
    B, H = {"dense": (3, 577), "rows": (40, 32)}.get(how, (9, 70))  # more units than a tile has; more rows
    G = GATES[cell]
    shapes = {"gx": (B, G * H), "gh": (B, (2 if before else G) * H)} | dict.fromkeys(("h", "c", "dh", "dc"), (B, H))
    placed = {name: sliced(normal(*shape, seed=i).to(dtype).to(DEVICE), how)
              for i, (name, shape) in enumerate(shapes.items())}  # fmt: skip
    rest = {name: normal(G * H, seed=i).to(dtype) for i, name in enumerate(("b_ih", "b_hh"))}
    rest["w_hn"] = (normal(H, H) / H**0.5).to(dtype)

    def run(kind: torch.dtype) -> dict[str, Tensor]:
        given = {name: t.cpu().to(kind).detach().clone() for name, t in (placed | rest).items()}
        return {name: t.detach() for name, t in specification(cell, given).items()}

    b_ih, b_hh, w_hn = (t.to(DEVICE) for t in rest.values())
    step = Step(cell, placed["gx"], placed["gh"], b_ih, b_hh, placed["h"], placed["c"])
    h_new, c_new, kept = pointwise_forward(step, w_hn, dtype, True)
    # 1 - h^2 keeps few digits of a rounded h near 1.
    y = pointwise_forward(step, w_hn, torch.float32, False)[0] if cell == "rnn_tanh" else h_new
    dg, dh_past, dc_past = pointwise_backward(step, w_hn, kept, y, placed["dh"], placed["dc"], dtype)
    outcome = {"h'": h_new, "c'": c_new, "dgx": dg, "dh": None if dh_past is None else dh_past.to(dtype), "dc": dc_past}
    errors = judge({n: t for n, t in outcome.items() if t is not None}, run(torch.float64), run(dtype), dtype)
    assert [str(error) for error in errors if not error.ok] == []


def test_what_is_kept_is_what_the_reference_keeps() -> None:
    """So that the operators of scans, which differentiate twice, can read it."""
    B, H = 3, 5
    h, c = normal(B, H, seed=1), normal(B, H, seed=2)
    for cell in CELLS:
        gx, w_hh = normal(B, GATES[cell] * H), normal(GATES[cell] * H, H, seed=3)
        saved: Any
        if cell == "lstm":
            saved = lstm.step(gx, h, c, w_hh)[2]
        elif cell == "gru":
            saved = gru.step(gx, h, w_hh)[1]
        elif cell == "gru_reset_before":
            saved = gru.step_reset_before(gx, h, w_hh)[1]
        else:
            assert KEPT[cell] == 0
            continue
        rows = w_hh[: 2 * H] if cell == "gru_reset_before" else w_hh
        given = [t.float().to(DEVICE) for t in (gx, h @ rows.t(), h, c, w_hh[2 * H :])]
        step = Step(cell, given[0], given[1], None, None, given[2], given[3])
        _, _, kept = pointwise_forward(step, given[4] if cell == "gru_reset_before" else None, torch.float32, True)
        assert kept is not None
        torch.testing.assert_close(kept.cpu(), torch.cat(saved, 1).float())
