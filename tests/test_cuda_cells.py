"""Single cells on the CUDA kernels: the whole step, its pointwise part alone in any strides, and which of the two
kernels, wide or not, takes what. Run by the emulator or, where the backend is usable, by a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import cuda_emulated
import pytest
import torch
from cell_formula import check_cell, evaluate, normal, sliced, specification
from torch import Tensor

import fusedseq
from fusedseq import registry
from fusedseq.backends import cuda
from fusedseq.backends.cuda_cell import KEPT, Step, pointwise_backward, pointwise_forward
from fusedseq.backends.cuda_products import compute
from fusedseq.reference import gru, lstm
from fusedseq.testing import DTYPES, judge
from fusedseq.testing.cases import CELLS, GATES, short

DEVICE = "cuda" if cuda.missing() is None else "cpu"
# B, I, H: one; odd and prime; whole numbers of 16 bytes; more units than a block has; an input without features.
SIZES = [(1, 1, 1), (3, 5, 7), (33, 4, 32), (2, 3, 257), (5, 0, 16)]


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    emulated = cuda.emulated(cuda_emulated.module()) if DEVICE == "cpu" else contextlib.nullcontext()
    with emulated, fusedseq.use_backend("cuda"), cuda_emulated.device(1):
        yield


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=short)
@pytest.mark.parametrize("cell", CELLS)
def test_cells_match_the_truth(cell: str, dtype: torch.dtype, seed: int) -> None:
    with registry.record() as choices, cuda_emulated.device(seed):
        for size in SIZES:
            check_cell("cuda", DEVICE, cell, size, dtype)
        check_cell("cuda", DEVICE, cell, (3, 5, 8), dtype, bias=False)
        check_cell("cuda", DEVICE, cell, (3, 5, 7), dtype, bias=False)
        check_cell("cuda", DEVICE, cell, (3, 5, 8), dtype, state=False)
        check_cell("cuda", DEVICE, cell, (3, 5, 7), dtype, state=False)
        check_cell("cuda", DEVICE, cell, (0, 3, 4), dtype)
    assert {choice.backend for choice in choices if choice.call.dtype == dtype} >= {"cuda"}


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_the_modules_run_here(name: str) -> None:
    x = torch.randn(4, 6, device=DEVICE)
    module = getattr(fusedseq, name)(6, 9).to(DEVICE)
    report = fusedseq.explain(module, x)
    assert report.backends == {"cuda"}
    want = getattr(torch.nn, name)(6, 9).to(DEVICE)
    want.load_state_dict(module.state_dict())
    torch.testing.assert_close(report.output, want(x))


def test_a_projection_takes_the_scan_of_one_step() -> None:
    weights = [normal(20, 3), normal(20, 2), normal(20), normal(20), normal(2, 5)]
    tensors: dict[str, Tensor | None] = {"x": normal(4, 3), "h": normal(4, 2), "c": normal(4, 5)}
    upstream = [normal(4, 2), normal(4, 5)]
    single: Any = [{n: t.float() for n, t in tensors.items() if t is not None}, [w.float() for w in weights],
                   [g.float() for g in upstream]]  # fmt: skip
    outcomes = []
    here: Any = [{n: t.to(DEVICE) for n, t in single[0].items()}, *([t.to(DEVICE) for t in one] for one in single[1:])]
    for backend, args in (("cuda", here), ("reference", [tensors, weights, upstream]), ("reference", single)):
        with fusedseq.use_backend(backend):
            outcomes.append(evaluate("lstm", *args))
    assert all(error.ok for error in judge(*outcomes, torch.float32, terms=20))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_second_derivatives_of_a_saved_step(cell: str) -> None:
    """The operator's own backward takes up what the cell has saved."""
    B, H = 3, 4
    x, h, c = (normal(B, H, seed=i).to(DEVICE).requires_grad_() for i in range(3))
    weights = [normal(GATES[cell] * H, H, seed=2).to(DEVICE), normal(GATES[cell] * H, H, seed=3).to(DEVICE)]
    found = []
    for backend in ("cuda", "reference"):
        with fusedseq.use_backend(backend):
            new, _ = fusedseq.ops.cell(cell, x, h, c if cell == "lstm" else None, weights)
            (first,) = torch.autograd.grad(new.square().sum(), x, create_graph=True)
            found.append((first.detach(), *torch.autograd.grad(first.square().sum(), (x, h))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def placed(cell: str, B: int, H: int, how: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What enters the pointwise part of a step and of its backward pass, in these strides."""
    G, S = GATES[cell], compute(dtype)
    gh = (2 if cell == "gru_reset_before" else G) * H
    shapes = {"gx": (B, G * H), "gh": (B, gh)} | dict.fromkeys(("h", "c", "dh", "dc"), (B, H))
    # The products are numbers of the dtype as well, so that the peer, which computes in it, is given the same.
    return {name: sliced(normal(*shape, seed=i).to(dtype).to(DEVICE, S if name in ("gx", "gh") else dtype), how)
            for i, (name, shape) in enumerate(shapes.items())}  # fmt: skip


def constants(cell: str, H: int, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {name: normal(GATES[cell] * H, seed=i).to(DEVICE, dtype) for i, name in enumerate(("b_ih", "b_hh"))}
    return found | {"w_hn": (normal(H, H) / H**0.5).to(DEVICE, dtype)}


def run_pointwise(
    cell: str, t: dict[str, Tensor], rest: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[bool, bool]]:
    """States and gradients, and which passes took the wide kernels."""
    step = Step(cell, t["gx"], t["gh"], rest["b_ih"], rest["b_hh"], t["h"], t["c"])
    new = pointwise_forward(step, rest["w_hn"], dtype, True)
    exact = None
    if cell == "rnn_tanh":  # 1 - h^2 keeps few digits of a rounded h near 1
        wide = {name: b.to(t["gx"].dtype) for name, b in rest.items()}
        exact = pointwise_forward(
            Step(cell, t["gx"], t["gh"], wide["b_ih"], wide["b_hh"], None, None), None, t["gx"].dtype, False
        ).h
    d = pointwise_backward(step, rest["w_hn"], new.kept, new.h, t["dh"], t["dc"], exact)
    gates = d.gates
    if cell == "gru":
        H = new.h.shape[1]
        assert torch.equal(d.inner[:, : 2 * H], d.gates[:, : 2 * H])
        gates = torch.cat([d.gates, d.inner[:, 2 * H :]], 1)
    found = {"h'": new.h, "c'": new.c, "dgx": gates, "dh": None if d.h is None else d.h.to(dtype), "dc": d.c}
    return {name: value for name, value in found.items() if value is not None}, (new.wide, d.wide)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=short)
@pytest.mark.parametrize("how", ["dense", "long", "rows", "columns", "expanded", "single"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_pointwise_part_in_any_strides(cell: str, how: str, dtype: torch.dtype) -> None:
    """Among them rows that several blocks share, by one unit a thread and by whole accesses."""
    B, H = {"dense": (3, 577), "long": (1, 257 * 16 // dtype.itemsize), "rows": (19, 32)}.get(how, (9, 72))
    given, rest = placed(cell, B, H, "dense" if how == "long" else how, dtype), constants(cell, H, dtype)

    def run(kind: torch.dtype) -> dict[str, Tensor]:
        named = {name: t.cpu().to(kind).detach().clone() for name, t in (given | rest).items()}
        return {name: t.detach() for name, t in specification(cell, named).items()}

    outcome, wide = run_pointwise(cell, given, rest, dtype)
    assert wide == (how in ("long", "expanded"),) * 2  # one row for all is as good as many
    errors = judge(outcome, run(torch.float64), run(dtype), dtype)
    assert [str(error) for error in errors if not error.ok] == []


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=short)
@pytest.mark.parametrize("cell", CELLS)
def test_wide_accesses_where_all_is_aligned_and_the_same_bits_where_not(cell: str, dtype: torch.dtype) -> None:
    """One operand after the other is moved off its alignment, which the emulator would not forgive a wide kernel."""
    B, unit = 3, 16 // dtype.itemsize
    H = 3 * unit
    given, rest = placed(cell, B, H, "dense", dtype), constants(cell, H, dtype)
    wanted, wide = run_pointwise(cell, given, rest, dtype)
    assert wide == (True, True)
    read_by = {"gx": (0,), "gh": (0,), "h": (0, 1) if cell.startswith("gru") else (), "dh": (1,), "b_ih": (0,),
               "b_hh": (0,), "c": (0, 1) if cell == "lstm" else (), "dc": (1,) if cell == "lstm" else ()}  # fmt: skip
    for name, passes in read_by.items():
        for how in ("address", "pitch"):
            old = (given | rest)[name]
            if how == "address":
                buffer = old.new_full((old.numel() + 1,), float("nan"))
                moved = buffer[1:].view(old.shape).copy_(old)
            elif old.dim() == 1:
                continue
            else:
                moved = old.new_full((B, old.shape[1] + 1), float("nan"))[:, :-1].copy_(old)
            found, wide = run_pointwise(cell, given | {name: moved}, rest | {name: moved}, dtype)
            assert wide == (0 not in passes, 1 not in passes), (name, how)
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), (name, how)
    # Rows that lie further apart by whole accesses, and a lone row wherever the next one would lie.
    apart = {name: t.new_full((B, t.shape[1] + 2 * unit), float("nan"))[:, : t.shape[1]].copy_(t)
             for name, t in given.items()}  # fmt: skip
    found, wide = run_pointwise(cell, apart, rest, dtype)
    assert wide == (True, True)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    lone = {name: t.new_full((1, t.shape[1] + 1), float("nan"))[:, :-1].copy_(t[:1]) for name, t in given.items()}
    found, wide = run_pointwise(cell, lone, rest, dtype)
    assert wide == (True, True)
    if cell != "gru_reset_before":  # whose product in the middle may sum in another order
        assert all(torch.equal(found[key], wanted[key][:1]) for key in wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_units_that_are_no_whole_number_of_accesses(cell: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for H in (1, 2, 7, 9, 16 // dtype.itemsize + 2):
            given, rest = placed(cell, 2, H, "dense", dtype), constants(cell, H, dtype)
            assert run_pointwise(cell, given, rest, dtype)[1] == (False, False)


def test_what_is_kept_is_what_the_reference_keeps() -> None:
    """So that the operators of scans, which differentiate twice, can read it."""
    B, H = 3, 4
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
        given = [t.to(DEVICE) for t in (gx, h @ rows.t(), h, c, w_hh[2 * H :])]
        step = Step(cell, given[0], given[1], None, None, given[2], given[3])
        kept = pointwise_forward(step, given[4], torch.float64, True).kept
        assert kept is not None
        torch.testing.assert_close(kept.cpu(), torch.cat(saved, 1))


def test_nan_and_infinity_go_through() -> None:
    for dtype, H in ((torch.float32, 8), (torch.float32, 7)):
        gx = torch.zeros(2, 4 * H, dtype=dtype, device=DEVICE)
        gx[0, 0], gx[1, 1], gx[1, H + 2] = float("nan"), float("inf"), float("-inf")
        new = pointwise_forward(Step("lstm", gx, None, None, None, None, None), None, dtype, False)
        assert new.kept is None and new.c is not None
        assert new.h[0, 0].isnan() and new.c[0, 0].isnan()
        rest = torch.ones_like(new.h, dtype=torch.bool)
        rest[0, 0] = False
        assert new.h[rest].isfinite().all()


def test_a_tensor_of_another_shape_or_dtype_is_named() -> None:
    gx = torch.zeros(2, 12)
    with pytest.raises(ValueError, match=r"h: expected torch.bfloat16 of shape \[2, 3\], got torch.float32 .*\[2, 4\]"):
        pointwise_forward(Step("lstm", gx, None, None, None, torch.zeros(2, 4), None), None, torch.bfloat16, False)
    with pytest.raises(ValueError, match=r"gx: expected torch.float64 of shape \[2, 12\], got torch.float32"):
        pointwise_forward(Step("lstm", gx, None, None, None, None, None), None, torch.float64, False)
    with pytest.raises(ValueError, match=r"dh: expected torch.float32 of shape \[2, 4\]"):
        pointwise_backward(Step("rnn_tanh", gx, None, None, None, None, None), None, None, torch.zeros(2, 4),
                           torch.zeros(4, 2), None)  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU checks no address")
def test_a_failed_launch_names_kernel_and_shape() -> None:
    """An address beyond the tensor's end: the emulator checks every access against the strides it was told."""
    core = cuda_emulated.module()
    word = torch.zeros(64)
    wrong = {"gx": (word.data_ptr() + 2, 8, 1), "h_new": (word.data_ptr(), 8, 1)}
    with pytest.raises(RuntimeError, match=r"cell_forward \(rnn_tanh float32 B=1 H=8\): .*misaligned"):
        core.cell_forward(3, 0, 0, 1, 8, wrong)
