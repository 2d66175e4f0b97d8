"""Scans of the CUDA backend: torch's products over all time steps around the recurrent kernel.

Notation: N rows of all time steps, in the order in which x has them; S the type that is computed in, float32 for half
types. Gates, gate gradients and the reserve are dense over the N rows.

float32 is multiplied as TF32 where torch would do so: the recurrence by torch's setting for recurrent layers, which is
on by default (`tf32`), the products over all time steps by its setting for matrix products, which is off by default.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedseq import config
from fusedseq.backends import tensors
from fusedseq.backends.cuda_products import WORKSPACE_UNIT, aligned, compute, product_of, product_of_steps, tf32
from fusedseq.backends.reference import Save, reserve_like


def _core() -> Any:
    from fusedseq.backends import cuda

    return cuda.core()


class _Layout(NamedTuple):
    """Where the row (t, b) stands among the N, and which rows are there."""

    packed: bool
    batch_first: bool
    T: int
    B: int
    rows: int
    lengths: Tensor | None  # [B] int32, on the device of x
    offsets: Tensor | None  # [T] int64, on the device of x

    def dense(self, t: Tensor | None, width: int) -> tuple[int, int, int] | None:
        """Address and strides of a tensor [N, width], or one of that memory."""
        if t is None:
            return None
        if self.packed:
            return t.data_ptr(), 0, width
        return (t.data_ptr(), width, self.T * width) if self.batch_first else (t.data_ptr(), self.B * width, width)

    def given(self, t: Tensor | None) -> tuple[int, int, int] | None:
        """The same of a caller's tensor."""
        return tensors.rows(t, self.packed, self.batch_first)

    def arguments(self) -> dict[str, Any]:
        return {"lengths": tensors.pointer(self.lengths), "offsets": tensors.pointer(self.offsets)}


def _layout(x: Tensor, T: int, B: int, batch_first: bool, lengths: Tensor | None, sizes: Tensor | None) -> _Layout:
    if sizes is not None:
        ends = (sizes.unsqueeze(1) > torch.arange(B, device=sizes.device)).sum(0, dtype=torch.int32)
        offsets = sizes.cumsum(0) - sizes
        return _Layout(True, False, T, B, x.shape[0], ends.to(x.device), offsets.to(x.device))
    on_device = None if lengths is None else lengths.to(torch.int32).to(x.device)
    return _Layout(False, batch_first, T, B, T * B, on_device, None)


class _Parameters(NamedTuple):
    """The flat list of weights, by kind; one of each per direction."""

    w_ih: list[Tensor]
    w_hh: list[Tensor]
    b_ih: list[Tensor]
    b_hh: list[Tensor]
    w_hr: list[Tensor]

    @classmethod
    def of(cls, weights: Sequence[Tensor], D: int) -> _Parameters:
        n = len(weights) // D
        weights = tensors.dense(weights)
        bias, projection = n >= 4, n in (3, 5)
        return cls(
            list(weights[0::n]), list(weights[1::n]), list(weights[2::n]) if bias else [],
            list(weights[3::n]) if bias else [], list(weights[n - 1 :: n]) if projection else [],
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        return {
            "w_hh": tuple(w.data_ptr() for w in self.w_hh),
            "w_hr": tuple(w.data_ptr() for w in self.w_hr),
        }


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextlib.contextmanager
def _on(x: Tensor) -> Any:
    """The stream of x's device as an address, that device being the current one; products keep the dtype they have."""
    with contextlib.ExitStack() as stack:
        if torch._C._is_any_autocast_enabled():
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        if x.is_cuda:
            stack.enter_context(torch.cuda.device(x.device))
        yield torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


@functools.lru_cache(maxsize=1024)
def _plan(core: Any, device: int | None, *arguments: Any) -> Any:
    return core.plan(*arguments)


def plan(
    core: Any, x: Tensor, cell: str, sizes: tuple[int, ...], projected: bool, backward: bool, rounded: bool
) -> Any:
    """How the device runs a scan of `sizes` T, B, H, R, D, its operands `rounded` to TF32 or not.

    The emulator's device may change, a GPU does not.
    """
    tier = -1 if config.settings.cuda_tier is None else core.tiers.index(config.settings.cuda_tier)
    by_warp = config.settings.cuda_cluster == "warp"
    codes = (tensors.CELLS[cell], tensors.DTYPES[x.dtype])
    arguments = (*codes, sizes, projected, backward, rounded, tier, by_warp)
    if not x.is_cuda:
        return core.plan(*arguments)
    return _plan(core, x.device.index, *arguments)


class Fault(RuntimeError):
    """A barrier between the parts of a kernel did not complete: its results are not to be used."""


@functools.cache
def _fault_word(device: str) -> Tensor:
    """What a kernel sets when a barrier does not complete. On the host, so that reading it waits for nothing."""
    with torch.inference_mode(False):  # it outlives the call that makes it
        return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device != "cpu")


def check_fault(device: torch.device) -> None:
    """Raise if a kernel on this device has given up; of kernels still running nothing is known."""
    word = _fault_word(str(device))
    if word.item():
        word.zero_()
        raise Fault(
            f"a kernel of the cuda backend on {device} waited in vain for another part of itself and gave up: "
            "what it returned is not to be used, and a CUDA error follows (FUSEDSEQ_CUDA_TIER=step and "
            "FUSEDSEQ_CUDA_ATTENTION=mma need no such waits)"
        )


def _workspace(x: Tensor, chosen: Any) -> Tensor:
    """Memory for one call. Given back when the call returns, it is reused only by later work on the same stream."""
    make = torch.zeros if chosen.zeroed else torch.empty
    return make(chosen.workspace + WORKSPACE_UNIT, dtype=torch.uint8, device=x.device)


def scan_forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    cells: bool,
    save: int,
    panels: object = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    check_fault(x.device)  # first: after a trap all else that touches the device raises a bare CUDA error
    D = 2 if bidirectional else 1
    T, B, _, H, R, _ = tensors.sizes(cell, x, h0, weights, D, batch_first, batch_sizes)
    p = _Parameters.of(weights, D)
    S, G = compute(x.dtype), tensors.GATES[cell]
    h0, c0 = (None if s is None else s.contiguous() for s in (h0, c0))
    make = x.new_empty if lengths is None else x.new_zeros
    y = make((*x.shape[:-1], D * R))
    c_all = make((*x.shape[:-1], D * H)) if cells else None
    reserve = reserve_like(cell, x, weights, bidirectional, save) if save else None
    if reserve is not None and lengths is not None:
        reserve.zero_()
    if T == 0 or B == 0:
        h_n = x.new_zeros((D, B, R)) if h0 is None else h0.clone()
        c_n = None if cell != "lstm" else x.new_zeros((D, B, H)) if c0 is None else c0.clone()
        return y, h_n, c_n, c_all, reserve
    h_n = x.new_empty((D, B, R))
    c_n = x.new_empty((D, B, H)) if cell == "lstm" else None
    layout = _layout(x, T, B, batch_first, lengths, batch_sizes)
    resets = None if resets is None else resets.contiguous()
    sizes = (T, B, H, R, D)
    core = _core()
    with _on(x) as stream:
        gates = product_of(x.reshape(layout.rows, x.shape[-1]), _joined(p.w_ih).t(), S, core, stream)
        rounded = tf32(x.dtype)
        chosen = plan(core, x, cell, sizes, bool(p.w_hr), False, rounded)
        workspace = _workspace(x, chosen)
        product, _kept = product_of_steps(core, cell, chosen, workspace, p.w_hh, B, False, rounded, stream)
        width = 0 if reserve is None else reserve.shape[2]
        core.scan_forward(
            chosen, tensors.CELLS[cell], tensors.DTYPES[x.dtype], sizes,
            {
                **layout.arguments(), **p.arguments(), "gates": layout.dense(gates, D * G * H),
                "b_ih": tuple(b.data_ptr() for b in p.b_ih), "b_hh": tuple(b.data_ptr() for b in p.b_hh),
                "h0": tensors.pointer(h0), "c0": tensors.pointer(c0), "resets": layout.given(resets),
                "y": layout.given(y), "c_all": layout.given(c_all), "h_n": h_n.data_ptr(), "c_n": tensors.pointer(c_n),
                "reserve": layout.dense(reserve, width) if width else None, "reserve_sd": layout.rows * width,
                "recompute": save == Save.STATES, "tf32": rounded, "workspace": aligned(workspace), "stream": stream,
                "fault": _fault_word(str(x.device)).data_ptr(),
                "product": product,
            },
        )  # fmt: skip
    return y, h_n, c_n, c_all, reserve


def scan_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    check_fault(x.device)
    D = 2 if bidirectional else 1
    T, B, _, H, R, _ = tensors.sizes(cell, x, h0, weights, D, batch_first, batch_sizes)
    p = _Parameters.of(weights, D)
    G = tensors.GATES[cell]
    if T == 0 or B == 0:
        dh0 = x.new_zeros((D, B, R)) if dh_n is None else dh_n.clone()
        dc0 = None if cell != "lstm" else x.new_zeros((D, B, H)) if dc_n is None else dc_n.clone()
        return x.new_zeros(x.shape) if need_dx else None, dh0, dc0, [torch.zeros_like(w) for w in weights if need_dw]
    if reserve.shape[2] != reserve_like(cell, x, weights, bidirectional).shape[2]:
        # The gates were not kept. The forward scan forms them again, and the very same y with them.
        *_, formed = scan_forward(
            cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, False, Save.GATES
        )
        assert formed is not None
        reserve = formed
    h0, c0, dh_n, dc_n = (None if s is None else s.contiguous() for s in (h0, c0, dh_n, dc_n))
    y = tensors.dense_rows(y)
    dy, dc_all = (None if g is None else tensors.dense_rows(g) for g in (dy, dc_all))
    resets = None if resets is None else resets.contiguous()
    layout = _layout(x, T, B, batch_first, lengths, batch_sizes)
    # Rows past a length are written by nobody and must add nothing.
    make = x.new_empty if lengths is None else x.new_zeros
    dgates = make((layout.rows, D * G * H))
    dhn = make((layout.rows, D * H)) if cell == "gru" else None
    dh = make((layout.rows, D * R)) if p.w_hr else None
    dh0 = x.new_empty((D, B, R))
    dc0 = x.new_empty((D, B, H)) if cell == "lstm" else None
    width = reserve.shape[2]
    sizes, codes = (T, B, H, R, D), (tensors.CELLS[cell], tensors.DTYPES[x.dtype])
    core = _core()
    with _on(x) as stream:
        rounded = tf32(x.dtype)
        chosen = plan(core, x, cell, sizes, bool(p.w_hr), True, rounded)
        workspace = _workspace(x, chosen)
        product, _kept = product_of_steps(core, cell, chosen, workspace, p.w_hh, B, True, rounded, stream)
        arguments = {
            **layout.arguments(), **p.arguments(), "h0": tensors.pointer(h0), "c0": tensors.pointer(c0),
            "resets": layout.given(resets), "y": layout.given(y),
            "reserve": layout.dense(reserve, width) if width else None, "reserve_sd": layout.rows * width,
            "tf32": rounded, "workspace": aligned(workspace), "stream": stream,
            "fault": _fault_word(str(x.device)).data_ptr(),
        }  # fmt: skip
        core.scan_backward(
            chosen, *codes, sizes,
            {
                **arguments, "dy": layout.given(dy), "dc_all": layout.given(dc_all), "dh_n": tensors.pointer(dh_n),
                "dc_n": tensors.pointer(dc_n), "dgates": layout.dense(dgates, D * G * H),
                "dhn": layout.dense(dhn, D * H), "dh": layout.dense(dh, D * R), "dh0": dh0.data_ptr(),
                "dc0": tensors.pointer(dc0), "product": product,
            },
        )  # fmt: skip
        dx = product_of(dgates, _joined(p.w_ih), x.dtype).view(x.shape) if need_dx else None
        if not need_dw:
            return dx, dh0, dc0, []
        previous = x.new_empty((layout.rows, D * R))
        core.previous(*codes, sizes, {**arguments, "into": layout.dense(previous, D * R)})
        dweights = _weight_gradients(cell, _live(x, layout), p, dgates, dhn, dh, previous, reserve)
    return dx, dh0, dc0, dweights


def _live(x: Tensor, layout: _Layout) -> Tensor:  # [N, I]
    """x, with zeros past the lengths: whatever stands there must not meet the zeros of the gate gradients."""
    if layout.lengths is not None and not layout.packed:
        live = torch.arange(layout.T, device=x.device).unsqueeze(1) < layout.lengths
        x = x.masked_fill(~(live.t() if layout.batch_first else live).unsqueeze(2), 0)
    return x.reshape(layout.rows, x.shape[-1])


def _weight_gradients(
    cell: str,
    x: Tensor,  # [N, I]
    p: _Parameters,
    dgates: Tensor,  # [N, D*G*H]
    dhn: Tensor | None,  # [N, D*H]
    dh: Tensor | None,  # [N, D*R]
    previous: Tensor,  # [N, D*R]
    reserve: Tensor,  # [D, N, S*H]
) -> list[Tensor]:
    """In the order of the flat list. Sums over all N rows, one product for each weight."""
    dtype, S, D = x.dtype, compute(x.dtype), len(p.w_hh)
    H = p.w_hh[0].shape[0] // tensors.GATES[cell]
    d_ih = product_of(dgates.t(), x, dtype).chunk(D)
    sums = dgates.sum(0, dtype=S).to(dtype).chunk(D) if p.b_ih else ()
    out: list[Tensor] = []
    for d in range(D):
        mine, h = dgates.chunk(D, 1)[d], previous.chunk(D, 1)[d]
        bias = sums[d] if p.b_ih else None
        if cell == "gru":
            assert dhn is not None
            inner = dhn.chunk(D, 1)[d]
            d_hh = torch.cat([product_of(mine[:, : 2 * H].t(), h, dtype), product_of(inner.t(), h, dtype)])
            if bias is not None:
                bias = torch.cat([bias[: 2 * H], inner.sum(0, dtype=S).to(dtype)])
        elif cell == "gru_reset_before":
            rh = (reserve[d, :, :H] * h).to(dtype)
            d_hh = torch.cat([product_of(mine[:, : 2 * H].t(), h, dtype), product_of(mine[:, 2 * H :].t(), rh, dtype)])
        else:
            d_hh = product_of(mine.t(), h, dtype)
        out += [d_ih[d].contiguous(), d_hh]
        if bias is not None:
            out += [sums[d].clone(), bias.clone()]
        if dh is not None:
            inside = (reserve[d, :, 3 * H : 4 * H] * reserve[d, :, 4 * H :].tanh()).to(dtype)
            out.append(product_of(dh.chunk(D, 1)[d].t(), inside, dtype))
    return out
