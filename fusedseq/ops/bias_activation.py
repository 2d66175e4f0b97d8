"""Bias, activation, dropout and residual connection in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedseq.ops.check import _bad_value
from fusedseq.ops.rows import Outputs, RowOperator, check_rows, is_ordinary, seed_for
from fusedseq.ops.scan import is_autocasting
from fusedseq.reference import bias_activation as reference
from fusedseq.reference.bias_activation import ACTIVATIONS, Problem


def _check(p: Problem) -> None:
    if p.activation not in ACTIVATIONS:
        _bad_value("activation", f"one of {', '.join(ACTIVATIONS)}", repr(p.activation))
    check_rows(p, ("residual",), ("bias",))


def _backward(p: Problem, dout: Tensor | None) -> Outputs:
    assert dout is not None
    return reference.backward(p, dout)


_operator = RowOperator(
    "bias_activation",
    Problem,
    "Tensor x, Tensor? bias, Tensor? residual, Tensor? seed, str activation, float dropout_p",
    tensors=4,
    differentiable=3,
    outputs=lambda p: (True,),
    results="Tensor out",
    check=_check,
    backward=_backward,
)
run = _operator.run


def overwrite(x: Tensor, bias: Tensor | None, activation: str, dropout_p: float) -> Tensor:
    """`bias_activation_dropout` for a caller who is the only one to hold x, which is overwritten if nobody minds.

    A large tensor's first touch costs as much as what is computed here.
    """
    p = Problem(x, bias, None, seed_for(x, dropout_p, None), activation, dropout_p)
    wants_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    if (torch.is_grad_enabled() and wants_grad) or is_autocasting() or not is_ordinary((x, bias)):
        (out,) = run(p)
    else:
        _check(p)
        (out,) = _operator.choose(p, None).bias_activation_forward(p, x)
    assert out is not None
    return out


def bias_activation_dropout(
    x: Tensor,  # [..., d]
    bias: Tensor | None = None,  # [d]
    *,
    activation: str = "identity",
    residual: Tensor | None = None,  # [..., d]
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """residual + dropout(activation(x + bias)): what follows the product of a linear layer.

    It computes in float32 (float64 for float64) whatever dtype the tensors have, and saves nothing but its inputs.

    Args:
        x, bias, residual: float32, float64, bfloat16 or float16, one dtype; any strides.
        activation: "identity", "relu", "gelu" (exact) or "gelu_tanh" (arXiv:1606.08415), "silu" (arXiv:1702.03118).
        dropout_p, seed: as in `fusedseq.residual_dropout_layer_norm`.

    Returns:
        A tensor [..., d] in the dtype of x, differentiable any number of times.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument, what was expected and what came.
    """
    seed = seed_for(x, dropout_p, seed)
    (out,) = run(Problem(x, bias, residual, seed, activation, float(dropout_p)))
    assert out is not None
    return out
