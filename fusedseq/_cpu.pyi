"""The compiled core. csrc/fusedseq.h states what each argument means; fusedseq.backends.cpu is its only caller."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

_Address: TypeAlias = int | None
_Rows: TypeAlias = tuple[int, int, int] | None  # address, stride over time, stride over the batch, in elements
_Sizes: TypeAlias = tuple[int, int, int, int, int, int]  # T, B, I, H, R, D
_Heads: TypeAlias = tuple[int, int, int, int]  # address, strides over the batch, heads and positions
_Table: TypeAlias = tuple[int, int, int, int, int]  # address, strides over B, Hq, L and S
_Problem: TypeAlias = tuple[
    _Heads,
    _Heads,
    _Heads,
    _Heads,
    int,
    _Table | None,
    _Address,
    _Address,
    _Table | None,
    _Address,
    _Address,
    _Address,
    _Address,
    int,
]  # q k v out lse bias alibi_slopes sinks dense key_lengths cu_q cu_k global_keys and its stride over the batch
_Numbers: TypeAlias = tuple[int, int, int, int, int, float, float, int | None, float, int]
_Grads: TypeAlias = tuple[
    _Heads, _Address, _Heads | None, _Heads | None, _Heads | None, _Table | None, _Address, _Address
]  # dout dlse dq dk dv dbias dalibi dsinks
_Weights: TypeAlias = tuple[tuple[_Address, _Address, _Address, _Address, _Address], ...]  # w_ih w_hh b_ih b_hh w_hr
_Dropout: TypeAlias = tuple[int, float, int]  # threshold, scale, seed
_Tensors3: TypeAlias = tuple[_Address, _Address, _Address]  # x bias residual
_Tensors4: TypeAlias = tuple[_Address, _Address, _Address, _Address]  # x residual weight bias, or their gradients

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...

class Panels:
    def __init__(self, cell: int, dtype: int, threads: int, sizes: _Sizes, weights: _Weights, /) -> None: ...
    @property
    def bytes(self) -> int: ...

class Scratch:
    def __init__(self, limit: int, /) -> None: ...
    @property
    def bytes(self) -> int: ...

def scan_forward(
    scratch: Scratch,
    cell: int,
    dtype: int,
    threads: int,
    sizes: _Sizes,
    x: _Rows,
    h0: _Address,
    c0: _Address,
    weights: _Weights,
    lengths: _Address,
    batch_sizes: _Address,
    resets: _Rows,
    y: _Rows,
    c_all: _Rows,
    h_n: _Address,
    c_n: _Address,
    reserve: _Address,
    recompute: bool,
    panels: Panels | None,
    /,
) -> None: ...
def scan_backward(
    scratch: Scratch,
    cell: int,
    dtype: int,
    threads: int,
    sizes: _Sizes,
    x: _Rows,
    h0: _Address,
    c0: _Address,
    weights: _Weights,
    lengths: _Address,
    batch_sizes: _Address,
    resets: _Rows,
    y: _Rows,
    reserve: _Address,
    recompute: bool,
    dy: _Rows,
    dc_all: _Rows,
    dh_n: _Address,
    dc_n: _Address,
    dx: _Rows,
    dh0: _Address,
    dc0: _Address,
    dweights: _Weights,
    /,
) -> None: ...
def attention_forward(threads: int, sizes: tuple[int, ...], tensors: _Problem, numbers: _Numbers, /) -> None: ...
def attention_backward(
    threads: int, sizes: tuple[int, ...], tensors: _Problem, numbers: _Numbers, grads: _Grads, /
) -> None: ...
def layer_norm_forward(
    threads: int, dtype: int, rows: int, d: int, eps: float, dropout: _Dropout | None, tensors: _Tensors4, out: int,
    sum: _Address, /,
) -> None: ...  # fmt: skip
def layer_norm_backward(
    threads: int, dtype: int, rows: int, d: int, eps: float, dropout: _Dropout | None, tensors: _Tensors4,
    upstream: tuple[_Address, _Address], grads: _Tensors4, /,
) -> None: ...  # fmt: skip
def bias_activation_forward(
    threads: int, dtype: int, rows: int, d: int, activation: int, dropout: _Dropout | None, tensors: _Tensors3,
    out: int, /,
) -> None: ...  # fmt: skip
def bias_activation_backward(
    threads: int, dtype: int, rows: int, d: int, activation: int, dropout: _Dropout | None, tensors: _Tensors3,
    dout: int, dx: _Address, dbias: _Address, /,
) -> None: ...  # fmt: skip
def linear_forward(
    threads: int, dtype: int, sizes: tuple[int, int, int], x: int, x_pitch: int, w: int, bias: _Address, y: int, /
) -> None: ...
def linear_backward(
    threads: int, dtype: int, sizes: tuple[int, int, int], x: int, x_pitch: int, w: int, dy: int, dy_pitch: int,
    dx: _Address, dw: _Address, db: _Address, /,
) -> None: ...  # fmt: skip

class Step:
    def __init__(
        self,
        local: object,
        cell: int,
        dtype: int,
        sizes: _Sizes,
        x_stride: int,
        layers: int,
        bias: bool,
        projection: bool,
        /,
    ) -> None: ...
    # A function of threads, x, h0, c0, y, h_n, c_n, weights and reserve.
    @property
    def run(
        self,
    ) -> Callable[
        [int, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Sequence[Tensor], Tensor | None], None
    ]: ...
    def backward(
        self,
        threads: int,
        dh: Tensor | None,
        dc: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        h_n: Tensor,
        reserve: Tensor | None,
        weights: Sequence[Tensor],
        dx: Tensor | None,
        dh0: Tensor,
        dc0: Tensor | None,
        dweights: Sequence[Tensor],
        /,
    ) -> None: ...

class PlainAttention:
    def __init__(self, sizes: tuple[int, ...], numbers: _Numbers, /) -> None: ...
    def __call__(
        self, threads: int, q: int, q_strides: Sequence[int], k: int, k_strides: Sequence[int], v: int,
        v_strides: Sequence[int], out: int, out_strides: Sequence[int], lse: int, /,
    ) -> bool: ...  # fmt: skip

def apply_math(which: int, dtype: int, x: int, y: int, n: int, /) -> None: ...
def multiply_adds(dtype: int, rounds: int, /) -> int: ...
