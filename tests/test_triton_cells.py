"""Single cells on the Triton kernels, and their pointwise part alone: strides, dtypes, what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def evaluate(
    cell: str, tensors: dict[str, Tensor | None], weights: list[Tensor], upstream: list[Tensor]
) -> dict[str, Tensor]:
    """States and every gradient of one step on the backend in force."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    held = [w.detach().requires_grad_() for w in weights]
    outputs = run_cell(cell, leaves["x"], leaves.get("h"), leaves.get("c"), held)
    states = {name: t for name, t in zip(("h'", "c'"), outputs, strict=True) if t is not None}
    named = leaves | {f"w{i}": w for i, w in enumerate(held)}
    grads = torch.autograd.grad(list(states.values()), list(named.values()), upstream[: len(states)])
    return {name: t.detach() for name, t in states.items()} | {
        "d" + name: grad for name, grad in zip(named, grads, strict=True)
    }


def check_cell(
    cell: str, size: tuple[int, int, int], dtype: torch.dtype, bias: bool = True, state: bool = True
) -> None:
    B, I, H = size
    G = GATES[cell]
    tensors: dict[str, Tensor | None] = {"x": normal(B, I), "h": normal(B, H, seed=1) if state else None}
    tensors["c"] = normal(B, H, seed=2) if state and cell == "lstm" else None
    shapes = [(G * H, I), (G * H, H), *([(G * H,)] * 2 if bias else [])]
    weights = [normal(*shape, seed=3 + i) / max(H, 1) ** 0.5 for i, shape in enumerate(shapes)]
    upstream = [normal(B, H, seed=8), normal(B, H, seed=9)]

    def outcome(backend: str, kind: torch.dtype, device: str) -> dict[str, Tensor]:
        rounded = {n: None if t is None else t.to(dtype).to(device, kind) for n, t in tensors.items()}
        with fusedseq.use_backend(backend):
            return evaluate(cell, rounded, [w.to(dtype).to(device, kind) for w in weights],
                            [g.to(dtype).to(device, kind) for g in upstream])  # fmt: skip

    truth, peer = (outcome("reference", kind, "cpu") for kind in (torch.float64, dtype))
    errors = judge(outcome("triton", dtype, DEVICE), truth, peer, dtype, terms=max(B, H))
    wrong = [str(error) for error in errors if not error.ok]
    assert not wrong, f"{cell} {short(dtype)} {size}: {wrong}"


@pytest.mark.parametrize("cell", CELLS)
def test_cells_match_the_truth(cell: str) -> None:
    for size in SIZES:
        check_cell(cell, size, torch.float32)
    check_cell(cell, (3, 5, 7), torch.float32, bias=False)
    check_cell(cell, (3, 5, 7), torch.float32, state=False)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.parametrize("cell", CELLS)
def test_cells_of_half_types(cell: str, dtype: torch.dtype) -> None:
    check_cell(cell, (5, 6, 33), dtype)
    check_cell(cell, (4, 3, 8), dtype, state=False)


def test_an_empty_batch() -> None:
    for cell in CELLS:
        check_cell(cell, (0, 3, 4), torch.float32)


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
    outcomes = []
    for backend, args in (("triton", single), ("reference", [tensors, weights, upstream]), ("reference", single)):
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


def sliced(t: Tensor, how: str) -> Tensor:
    """The same numbers in other strides, NaN between and around them."""
    if how == "dense":
        return t.contiguous()
    if how == "rows":
        buffer = t.new_full((t.shape[0], t.shape[1] + 7), float("nan"))
        buffer[:, 3:-4] = t
        return buffer[:, 3:-4]
    if how == "columns":
        buffer = t.new_full((t.shape[1] * 2, t.shape[0] + 1), float("nan"))
        buffer[::2, :-1] = t.t()
        return buffer[::2, :-1].t()
    return t[:1].expand_as(t)


def specification(cell: str, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """States and gradients of the pointwise part, by autograd."""
    gx, gh, h, c = (t[name].requires_grad_() for name in ("gx", "gh", "h", "c"))
    b_ih, b_hh, dh, dc = t["b_ih"], t["b_hh"], t["dh"], t["dc"]
    if cell == "lstm":
        h_new, c_new, _ = lstm.step(gx + gh + b_ih + b_hh, h, c, torch.zeros(gh.shape[1], h.shape[1], dtype=h.dtype))
        dgx, dc_past = torch.autograd.grad((h_new, c_new), (gx, c), (dh, dc))
        return {"h'": h_new, "c'": c_new, "dgx": dgx, "dc": dc_past}
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = (gx + b_ih).chunk(3, 1), (gh + b_hh).chunk(3, 1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        h_new = (1 - z) * (xn + r * hn).tanh() + z * h
        dgx, dgh, dh_past = torch.autograd.grad(h_new, (gx, gh, h), dh)
        return {"h'": h_new, "dgx": torch.cat([dgx, dgh.chunk(3, 1)[2]], 1), "dh": dh_past}
    if cell == "gru_reset_before":
        w_hh = torch.cat([torch.zeros(gh.shape[1], h.shape[1], dtype=h.dtype), t["w_hn"]])
        products = torch.nn.functional.pad(gh, (0, h.shape[1]))
        h_new, _ = gru.step_reset_before(gx + products + b_ih + b_hh, h, w_hh)
        dgx, dh_past = torch.autograd.grad(h_new, (gx, h), dh)
        return {"h'": h_new, "dgx": dgx, "dh": dh_past}
    h_new = (torch.tanh if cell == "rnn_tanh" else torch.relu)(gx + gh + b_ih + b_hh)
    return {"h'": h_new, "dgx": torch.autograd.grad(h_new, gx, dh)[0]}


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
