"""Single cells, whole or their pointwise part alone, in plain PyTorch: for the tests of the backends that fuse them."""

from __future__ import annotations

import torch
from torch import Tensor

import fusedseq
from fusedseq.ops import cell as run_cell
from fusedseq.reference import gru, lstm
from fusedseq.testing import judge
from fusedseq.testing.cases import GATES, short


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
    backend: str, device: str, cell: str, size: tuple[int, int, int], dtype: torch.dtype, bias: bool = True,
    state: bool = True,
) -> None:  # fmt: skip
    """One step on a backend against the float64 truth: states, and every gradient. `size` is B, I, H."""
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
    errors = judge(outcome(backend, dtype, device), truth, peer, dtype, terms=max(B, H))
    wrong = [str(error) for error in errors if not error.ok]
    assert not wrong, f"{backend} {cell} {short(dtype)} {size}: {wrong}"


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
    return (t[:1] if how == "expanded" else t[:1, :1]).expand_as(t)


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
