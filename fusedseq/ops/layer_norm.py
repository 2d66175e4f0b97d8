"""Residual connection, dropout and layer normalisation in one pass over memory."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fusedseq.ops.check import _bad_value
from fusedseq.ops.rows import RowOperator, check_rows, seed_for
from fusedseq.reference import layer_norm as reference
from fusedseq.reference.layer_norm import Problem


def _check(p: Problem) -> None:
    check_rows(p, ("residual",), ("weight", "bias"))
    if not p.eps >= 0:
        _bad_value("eps", "a number of at least 0", p.eps)


_operator = RowOperator(
    "layer_norm",
    Problem,
    "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps, float dropout_p, "
    "bool return_sum",
    tensors=5,
    differentiable=4,
    outputs=lambda p: (True, p.return_sum),
    results="Tensor out, Tensor sum",
    check=_check,
    backward=reference.backward,
)
run = _operator.run


@overload
def residual_dropout_layer_norm(
    x: Tensor, residual: Tensor | None = ..., weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ...,
    *, dropout_p: float = ..., seed: int | Tensor | None = ..., return_sum: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def residual_dropout_layer_norm(
    x: Tensor, residual: Tensor | None = ..., weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ...,
    *, dropout_p: float = ..., seed: int | Tensor | None = ..., return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def residual_dropout_layer_norm(
    x: Tensor,  # [..., d]
    residual: Tensor | None = None,  # [..., d]
    weight: Tensor | None = None,  # [d]
    bias: Tensor | None = None,  # [d]
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """layer_norm(residual + dropout(x)) over the last dimension, d (Ba et al. 2016, arXiv:1607.06450).

    It computes in float32 (float64 for float64) whatever dtype the tensors have, and saves nothing but its inputs.

    Args:
        x, residual, weight, bias: float32, float64, bfloat16 or float16, one dtype; any strides.
        eps: added to the variance.
        dropout_p: probability with which an element of x is zeroed; the others are scaled by 1 / (1 - p).
        seed: of dropout, an int or an int64 tensor of one element; drawn from torch's generator by default. Element j
            of row r, all dimensions but the last counting as one, is dropped if word (j // 16) % 4 of Philox 4x32-10
            (Salmon et al. 2011, doi:10.1145/2063384.2063405) with counter (16 (j // 64) + j % 16, r mod 2^32, 0, r //
            2^32) and key (seed mod 2^32, seed // 2^32) is below round(p 2^32): the same on every backend.
        return_sum: also return residual + dropout(x), which a layer that normalises first hands on.

    Returns:
        out [..., d] in the dtype of x, with return_sum a pair of it and the sum [..., d]. Both are differentiable any
        number of times.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument, what was expected and what came.
    """
    seed = seed_for(x, dropout_p, seed)
    out, total = run(Problem(x, residual, weight, bias, seed, float(eps), float(dropout_p), return_sum))
    assert out is not None
    if not return_sum:
        return out
    assert total is not None
    return out, total
