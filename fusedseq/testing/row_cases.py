"""Cases of layer_norm and bias_activation as text, their tensors, and when a result is right.

A case is `layer_norm-7x5x131-residual-weight`: the operator, the sizes of x and a few words, in any order:
    residual, weight, bias, dropout (p = 0.3), p1 (p = 1), sum
    relu, gelu, gelu_tanh, silu     the activation, identity if there is none
    sliced                          tensors of rows are strided slices of larger buffers, with NaN between
    far                             rows have a mean a hundred times their spread
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedseq.reference import bias_activation, layer_norm
from fusedseq.reference.bias_activation import ACTIVATIONS
from fusedseq.reference.dropout import dropout_scale

from .compare import Outcome, judge

OPERATORS: dict[str, Any] = {"layer_norm": layer_norm, "bias_activation": bias_activation}
_FIELDS = {"layer_norm": ("x", "residual", "weight", "bias"), "bias_activation": ("x", "bias", "residual")}
Run = Callable[[Any], Sequence[Tensor | None]]

_CASES = """
layer_norm-1
layer_norm-1x1-residual-weight-bias
layer_norm-3x64-weight-bias
layer_norm-7x5x131-residual-weight-bias-dropout
layer_norm-2x33x65-residual-weight-dropout-sum
layer_norm-17x16-residual-sum-sliced
layer_norm-67x128-residual-weight-bias-dropout-sum-sliced
layer_norm-300x100-residual-weight-bias-dropout
layer_norm-40x512-residual-weight-bias
layer_norm-9x31-dropout-bias
layer_norm-5x77-residual-weight-bias-p1
layer_norm-6x200-weight-bias-far
layer_norm-0x8-residual-weight-bias-sum
layer_norm-3x0-residual-weight-bias
bias_activation-1-bias-gelu
bias_activation-1x1-relu
bias_activation-7x5x131-bias-gelu-dropout
bias_activation-67x128-bias-relu-dropout-sliced
bias_activation-2x33x65-bias-gelu_tanh-dropout-residual
bias_activation-300x100-bias-silu-residual-sliced
bias_activation-17x16-residual-dropout
bias_activation-40x512-bias-gelu
bias_activation-9x31-bias-relu-p1-residual
bias_activation-9x31-bias
bias_activation-0x8-bias-gelu-residual
bias_activation-3x0-bias-relu
"""


class RowCase(NamedTuple):
    text: str

    @property
    def op(self) -> str:
        return self.text.split("-")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, self.text.split("-")[1].split("x")))

    @property
    def words(self) -> list[str]:
        return self.text.split("-")[2:]


CASES = [RowCase(text) for text in _CASES.split()]


class RowInputs(NamedTuple):
    case: RowCase
    problem: Any
    upstream: list[Tensor]  # one for each output

    def to(self, dtype: torch.dtype) -> RowInputs:
        cast = (t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in self.problem)
        return RowInputs(self.case, type(self.problem)(*cast), [t.to(dtype) for t in self.upstream])


def make_rows(case: RowCase, dtype: torch.dtype, device: str = "cpu") -> RowInputs:
    """The tensors of a case: the same for every dtype up to rounding."""
    gen = torch.Generator().manual_seed(zlib.crc32(case.text.encode()))
    shape, words = case.shape, case.words

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, dtype=torch.float64).to(device, dtype)

    def rows() -> Tensor:
        t = normal(*shape)
        if "sliced" not in words:
            return t
        buffer = t.new_full((*shape[:-1], shape[-1] + 5), float("nan"))
        buffer[..., 2:-3] = t
        return buffer[..., 2:-3]

    given: dict[str, Any] = {"x": rows() + 100 if "far" in words else rows()}
    for name in _FIELDS[case.op][1:]:
        if name in words:
            given[name] = rows() if name == "residual" else normal(shape[-1])
    if "dropout" in words or "p1" in words:
        given |= {"seed": torch.tensor(0x1234567890ABCDEF, device=device), "dropout_p": 1.0 if "p1" in words else 0.3}
    if case.op == "layer_norm":
        given["return_sum"] = "sum" in words
    else:
        given["activation"] = next((name for name in ACTIVATIONS if name in words), "identity")
    return RowInputs(case, OPERATORS[case.op].Problem(**given), [rows() for _ in range(1 + ("sum" in words))])


def _torch_peer(p: Any) -> Sequence[Tensor | None]:
    """The same by torch's functions, each rounding to the dtype; dropout by the specification's mask."""
    scale = None
    if p.dropout_p:
        scale = dropout_scale(p.x.shape, p.dropout_p, p.seed, p.x.dtype)
    if isinstance(p, layer_norm.Problem):
        s = p.x if scale is None else p.x * scale
        s = s if p.residual is None else s + p.residual
        return F.layer_norm(s, p.x.shape[-1:], p.weight, p.bias, p.eps), s if p.return_sum else None
    y = p.x if p.bias is None else p.x + p.bias
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu,
    }  # fmt: skip
    y = functions.get(p.activation, torch.clone)(y)
    y = y if scale is None else y * scale
    return (y if p.residual is None else y + p.residual,)


def evaluate_rows(run: Run, inputs: RowInputs) -> Outcome:
    """The outputs and, with `d` before its name, the gradient of every input that was given."""
    p, names = inputs.problem, _FIELDS[inputs.case.op]
    leaves = {name: t.detach().requires_grad_() for name in names if (t := getattr(p, name)) is not None}
    outputs = [t for t in run(p._replace(**leaves)) if t is not None]
    grads = torch.autograd.grad(outputs, list(leaves.values()), inputs.upstream)
    named = {f"out{i}": t.detach() for i, t in enumerate(outputs)}
    return named | {"d" + name: g.detach() for name, g in zip(leaves, grads, strict=True)}


@functools.lru_cache(maxsize=256)
def row_baseline(case: RowCase, dtype: torch.dtype) -> tuple[RowInputs, Outcome, Outcome]:
    """Inputs, the float64 truth and torch's own results."""
    inputs = make_rows(case, dtype)
    truth = evaluate_rows(OPERATORS[case.op].forward, inputs.to(torch.float64))
    return inputs, truth, evaluate_rows(_torch_peer, inputs)


def check_rows(run: Run, case: RowCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that an implementation computes a case right: every output and the gradient of every input."""
    inputs, truth, peer = row_baseline(case, dtype)
    inputs = inputs if device == "cpu" else make_rows(case, dtype, device)
    terms = max(case.shape[-1], int(torch.Size(case.shape[:-1]).numel()))
    wrong = [str(e) for e in judge(evaluate_rows(run, inputs), truth, peer, dtype, terms) if not e.ok]
    if wrong:
        raise AssertionError("\n  ".join([f"{dtype} {case.text}", *wrong]))
