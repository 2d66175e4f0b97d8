"""`fusedseq::scan` and `fusedseq::scan_backward`: the operators as torch.compile, AMP and torch.func see them.

An operator returns tensors only, so what does not apply comes back with shape [0]. The backend travels by name, ""
leaving the choice to the registry at run time, when the sizes are known. Lengths and batch sizes are data: nothing
here reads them while shapes are being traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedseq import registry
from fusedseq.backends import reference
from fusedseq.ops import batching, check, derivative

_lib = torch.library.Library("fusedseq", "DEF")
_lib.define(
    "scan(str cell, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool bidirectional, bool batch_first, "
    "Tensor? lengths, Tensor? batch_sizes, Tensor? resets, bool cells, int save, SymInt batch, str backend) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c_all, Tensor reserve)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "scan_backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, Tensor x, Tensor? h0, "
    "Tensor? c0, Tensor[] weights, bool bidirectional, bool batch_first, Tensor? lengths, Tensor? batch_sizes, "
    "Tensor? resets, Tensor y, Tensor reserve, bool need_dx, bool need_dw, SymInt batch, str backend) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_scan = torch.ops.fusedseq.scan.default
_scan_backward = torch.ops.fusedseq.scan_backward.default


def _own(t: Tensor, *inputs: Tensor | None) -> Tensor:
    """An operator's output must be contiguous, as the fake one is, and never one of its inputs."""
    t = t.contiguous()
    return t.clone() if any(i is not None and i.data_ptr() == t.data_ptr() for i in inputs) and t.numel() else t


def _scan_impl(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], bidirectional: bool,
    batch_first: bool, lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None, cells: bool,
    save: int, batch: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = check.scan(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, batch
    )  # fmt: skip
    lengths, batch_sizes = check.data(lengths, batch_sizes, x, sizes)
    module = registry.choose(
        registry.scan_call(cell, x, sizes, batch_sizes, lengths, resets, cells, bool(save)), backend
    )  # fmt: skip
    y, h_n, c_n, c_all, reserve = module.scan_forward(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, save
    )
    return (
        _own(y),
        _own(h_n, h0),
        x.new_empty(0) if c_n is None else _own(c_n, c0),
        x.new_empty(0) if c_all is None else _own(c_all),
        x.new_empty(0) if reserve is None else reserve,
    )


def _scan_fake(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], bidirectional: bool,
    batch_first: bool, lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None, cells: bool,
    save: int, batch: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _, B, _, H, R, D = check.scan(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, batch
    )
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, D * R)),
        x.new_empty((D, B, R)),
        x.new_empty((D, B, H) if cell == "lstm" else (0,)),
        x.new_empty((*rows, D * H) if cells else (0,)),
        reference.reserve_like(cell, x, weights, bidirectional, save) if save else x.new_empty(0),
    )


def _backward_impl(
    cell: str, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc_all: Tensor | None, x: Tensor,
    h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], bidirectional: bool, batch_first: bool,
    lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None, y: Tensor, reserve: Tensor,
    need_dx: bool, need_dw: bool, batch: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    cells = dc_all is not None
    sizes = check.scan(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, cells, batch
    )  # fmt: skip
    lengths, batch_sizes = check.data(lengths, batch_sizes, x, sizes)
    module = registry.choose(
        registry.scan_call(cell, x, sizes, batch_sizes, lengths, resets, cells, True), backend
    )  # fmt: skip
    options = (bidirectional, batch_first, lengths, batch_sizes, resets)
    if reserve.dim() != 3:
        # The forward pass did not know that it would be differentiated.
        y, *_, reserve = module.scan_forward(cell, x, h0, c0, weights, *options, cells, reference.Save.GATES)
    dx, dh0, dc0, dweights = module.scan_backward(
        cell, dy, dh_n, dc_n, dc_all, x, h0, c0, weights, *options, y, reserve, need_dx, need_dw
    )
    return (
        x.new_empty(0) if dx is None else _own(dx, dy),
        _own(dh0, dh_n),
        x.new_empty(0) if dc0 is None else _own(dc0, dc_n),
        [_own(dw) for dw in dweights],
    )


def _backward_fake(
    cell: str, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc_all: Tensor | None, x: Tensor,
    h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], bidirectional: bool, batch_first: bool,
    lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None, y: Tensor, reserve: Tensor,
    need_dx: bool, need_dw: bool, batch: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    _, B, _, H, R, D = check.scan(
        cell, x, h0, c0, weights, bidirectional, batch_first, lengths, batch_sizes, resets, False, batch
    )
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty((D, B, R)),
        x.new_empty((D, B, H) if cell == "lstm" else (0,)),
        [w.new_empty(w.shape) for w in weights] if need_dw else [],
    )


def _autocast(key: str, device: str) -> Any:
    guarded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(
        cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], *options: Any
    ) -> tuple[Tensor, ...]:
        args = autocast(device, x, h0, c0, weights)
        with torch._C._ExcludeDispatchKeyGuard(guarded):
            return _scan(cell, *args, *options)

    return run


def autocast(
    device: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """Cast as torch's own fused LSTM does under autocast: all tensors to the region's dtype, float64 left alone."""
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.dtype in (torch.float32, torch.bfloat16, torch.float16) else t

    return cast(x), None if h0 is None else cast(h0), None if c0 is None else cast(c0), [cast(w) for w in weights]


_lib.impl("scan", _scan_impl, "CompositeExplicitAutograd")
_lib.impl("scan_backward", _backward_impl, "CompositeExplicitAutograd")
_lib.impl("scan", _autocast("AutocastCPU", "cpu"), "AutocastCPU")
_lib.impl("scan", _autocast("AutocastCUDA", "cuda"), "AutocastCUDA")
torch.library.register_fake("fusedseq::scan", _scan_fake, lib=_lib)
torch.library.register_fake("fusedseq::scan_backward", _backward_fake, lib=_lib)
_lib.impl("scan", derivative.scan, "Autograd", with_keyset=True)
_lib.impl("scan_backward", derivative.scan_backward, "Autograd", with_keyset=True)
torch.library.register_vmap("fusedseq::scan", batching.scan, lib=_lib)
torch.library.register_vmap("fusedseq::scan_backward", batching.scan_backward, lib=_lib)
