"""Everything a caller can get wrong, found before a kernel sees it, and named: argument, expected, given.

Two kinds of error. `ArgumentValueError` is about sizes and values, `ArgumentTypeError` about types, dtypes and
devices. Both are also the RuntimeError that torch itself raises for most of these, so that code written for torch.nn
catches what it always caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}
_WEIGHT_NAMES = {
    2: ("w_ih", "w_hh"),
    3: ("w_ih", "w_hh", "w_hr"),
    4: ("w_ih", "w_hh", "b_ih", "b_hh"),
    5: ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"),
}


class ArgumentValueError(ValueError, RuntimeError):
    """An argument has the wrong size or value."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument has the wrong type, dtype or device."""


class Sizes(NamedTuple):
    T: int
    B: int
    I: int
    H: int
    R: int
    D: int


def _bad_value(name: str, expected: str, got: object) -> NoReturn:
    raise ArgumentValueError(f"{name}: expected {expected}, got {got}")


def _bad_type(name: str, expected: str, got: object) -> NoReturn:
    raise ArgumentTypeError(f"{name}: expected {expected}, got {got}")


def _shape(sizes: Sequence[Any]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def types(x: Any, h0: Any, c0: Any, weights: Any, lengths: Any, batch_sizes: Any, resets: Any, step: bool) -> None:
    """Every tensor argument is a tensor; the other checks rely on it."""
    if not isinstance(x, Tensor):
        _bad_type("x", "a tensor", type(x).__name__)
    h, c = ("h", "c") if step else ("h0", "c0")
    optional = {h: h0, c: c0, "lengths": lengths, "batch_sizes": batch_sizes, "resets": resets}
    for name, value in optional.items():
        if value is not None and not isinstance(value, Tensor):
            _bad_type(name, "a tensor or None", type(value).__name__)
    if not isinstance(weights, (list, tuple)):
        _bad_type("weights", "a list of tensors", type(weights).__name__)
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor):
            _bad_type(f"weights[{i}]", "a tensor", type(w).__name__)


def scan(
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
    batch: int,
    step: bool = False,
) -> Sizes:
    """Check shapes, dtypes and devices, and return the sizes. Values are left to `data`.

    Runs on every call, streaming steps included, so what is right costs a few comparisons and no more. `batch` is the
    batch size of packed input, which no shape shows. With `step`, x is [B, I] and the states are [B, R] and [B, H].
    """
    gates = GATES.get(cell)
    if gates is None:
        _bad_value("cell", f"one of {', '.join(GATES)}", repr(cell))
    D = 2 if bidirectional else 1
    count = len(weights)
    per = count // D
    if count % D or per not in _WEIGHT_NAMES or (per in (3, 5) and cell != "lstm"):
        _weight_count(cell, D, count)

    dtype, shape = x.dtype, x.shape
    if dtype not in DTYPES:
        _bad_type("x", "dtype float32, float64, bfloat16 or float16", dtype)
    if step:
        if len(shape) != 2:
            _bad_value("x", "2 dimensions [B, I]", f"{len(shape)}: {_shape(shape)}")
        T, B, I = 1, shape[0], shape[1]
    elif batch_sizes is not None:
        if lengths is not None:
            _bad_value("lengths", "None together with batch_sizes (packed input knows its lengths)", "a tensor")
        if len(shape) != 2:
            _bad_value("x", "2 dimensions [N, I] together with batch_sizes", f"{len(shape)}: {_shape(shape)}")
        if batch_sizes.dim() != 1:
            _bad_value("batch_sizes", "1 dimension [T]", f"{batch_sizes.dim()}: {_shape(batch_sizes.shape)}")
        _index_tensor("batch_sizes", batch_sizes)
        T, B, I = batch_sizes.shape[0], batch, shape[1]
    elif len(shape) != 3:
        layout = "[B, T, I]" if batch_first else "[T, B, I]"
        _bad_value("x", f"3 dimensions {layout}", f"{len(shape)}: {_shape(shape)}")
    elif batch_first:
        B, T, I = shape
    else:
        T, B, I = shape

    w_hh = weights[1]
    if w_hh.dim() != 2 or w_hh.shape[0] % gates:
        _bad_value("weights[1] (w_hh)", f"2 dimensions [{gates}*H, R]", _shape(w_hh.shape))
    GH, R = w_hh.shape
    H = GH // gates
    if R != H and per in (2, 4):
        _bad_value("weights[1] (w_hh)", _shape((GH, H)), _shape(w_hh.shape))
    expected: tuple[tuple[int, ...], ...] = ((GH, I), (GH, R))
    if per >= 4:
        expected += ((GH,), (GH,))
    if per in (3, 5):
        expected += ((R, H),)
    device, on_cpu = x.device, x.is_cpu  # `is_cpu` is read three times faster than two devices are compared
    for i, (w, want) in enumerate(zip(weights, expected * D, strict=True)):
        if w.shape != want or w.dtype is not dtype or not (w.is_cpu if on_cpu else w.device == device):
            _tensor(f"weights[{i}] ({_WEIGHT_NAMES[per][i % per]})", w, want, dtype, device)

    if h0 is not None:
        h_shape = (B, R) if step else (D, B, R)
        if h0.shape != h_shape or h0.dtype is not dtype or h0.device != device:
            _tensor("h" if step else "h0", h0, h_shape, dtype, device)
    if c0 is not None:
        c_shape = (B, H) if step else (D, B, H)
        if cell != "lstm":
            expected_c = f"None for {cell!r}: only an LSTM has a cell state"
            _bad_value("c" if step else "c0", expected_c, f"a tensor {_shape(c0.shape)}")
        if c0.shape != c_shape or c0.dtype is not dtype or c0.device != device:
            _tensor("c" if step else "c0", c0, c_shape, dtype, device)
    if cells and cell != "lstm":
        _bad_value("cells", f"False for {cell!r}: only an LSTM has cell states", cells)
    if lengths is not None:
        if lengths.shape != (B,):
            _bad_value("lengths", f"shape {_shape((B,))}", _shape(lengths.shape))
        _index_tensor("lengths", lengths)
    if resets is not None:
        if resets.dtype is not torch.bool:
            _bad_type("resets", "dtype torch.bool", resets.dtype)
        if resets.shape != shape[:-1]:
            _bad_value("resets", f"shape {_shape(shape[:-1])}, that of x without its last", _shape(resets.shape))
        if resets.device != device:
            _bad_type("resets", f"device {device}, that of x", resets.device)
    return Sizes(T, B, I, H, R, D)


def _weight_count(cell: str, D: int, count: int) -> NoReturn:
    allowed = [n * D for n in (_WEIGHT_NAMES if cell == "lstm" else (2, 4))]
    if cell != "lstm" and count in (3 * D, 5 * D):
        expected = f"{allowed[0]} or {allowed[1]} tensors for {cell!r}: only an LSTM has a projection (w_hr)"
    else:
        expected = f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]} tensors for {cell!r} with {D} direction(s)"
    _bad_value("weights", expected, count)


def _tensor(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> NoReturn:
    """Say which of shape, dtype and device is the wrong one."""
    if t.shape != shape:
        _bad_value(name, f"shape {_shape(shape)}", _shape(t.shape))
    if t.dtype is not dtype:
        _bad_type(name, f"dtype {dtype}, that of x", t.dtype)
    _bad_type(name, f"device {device}, that of x", t.device)


def _index_tensor(name: str, t: Tensor) -> None:
    if t.dtype not in (torch.int64, torch.int32):
        _bad_type(name, "dtype torch.int64", t.dtype)


def data(
    lengths: Tensor | None, batch_sizes: Tensor | None, x: Tensor, sizes: Sizes
) -> tuple[Tensor | None, Tensor | None]:
    """Check the values of lengths and batch_sizes, and return both as backends take them."""
    lengths, batch_sizes = index(lengths), index(batch_sizes)
    if lengths is not None:
        _lengths(lengths, sizes.T)
    if batch_sizes is not None:
        _batch_sizes(batch_sizes, x.shape[0], sizes.B)
    return lengths, batch_sizes


def index(t: Tensor | None) -> Tensor | None:
    """Lengths as backends take them: dense int64 on the CPU."""
    return None if t is None else t.to("cpu", torch.int64).contiguous()


def _lengths(lengths: Tensor, T: int) -> None:
    """0 <= lengths <= T."""
    if lengths.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(lengths))
    if low < 0:
        _bad_value("lengths", "no negative entry", low)
    if high > T:
        _bad_value("lengths", f"entries of at most T = {T}", high)


def _batch_sizes(batch_sizes: Tensor, rows: int, batch: int) -> None:
    """batch_sizes is positive, non-increasing, begins with the batch size and sums up to the rows of x."""
    if batch_sizes.numel() == 0:
        if rows:
            _bad_value("batch_sizes", f"a sum of {rows}, the rows of x", 0)
        return
    if not bool((batch_sizes[1:] <= batch_sizes[:-1]).all()):
        _bad_value("batch_sizes", "non-increasing entries", batch_sizes.tolist())
    first, last, total = int(batch_sizes[0]), int(batch_sizes[-1]), int(batch_sizes.sum())
    if last < 1:
        _bad_value("batch_sizes", "positive entries", last)
    if total != rows:
        _bad_value("batch_sizes", f"a sum of {rows}, the rows of x", total)
    if first != batch:
        _bad_value("h0", f"a batch of {first}, that of batch_sizes[0]", batch)
