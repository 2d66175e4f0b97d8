"""layer_norm and bias_activation under everything that PyTorch does to an operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusedseq import bias_activation_dropout, registry, residual_dropout_layer_norm, use_backend
from fusedseq.ops import bias_activation, layer_norm
from fusedseq.testing import cpu_backends
from fusedseq.testing.row_cases import RowCase, RowInputs, evaluate_rows, make_rows

USABLE = cpu_backends()
RUN: Any = {"layer_norm": layer_norm.run, "bias_activation": bias_activation.run}
DIFFERENTIABLE = {"layer_norm": 4, "bias_activation": 3}
SMALL = (
    "layer_norm-2x3x5-residual-weight-bias-dropout-sum",
    "layer_norm-3x6-weight",
    "layer_norm-3x6-residual-bias",
    "bias_activation-2x3x5-bias-residual-gelu-dropout",
    "bias_activation-3x6-bias-gelu_tanh",
    "bias_activation-3x6-bias-silu",
    "bias_activation-3x6-bias-residual-relu",
)


@pytest.fixture(params=USABLE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    torch._dynamo.reset()
    with use_backend(request.param):
        yield request.param


class Watch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def leaves(inputs: RowInputs) -> list[Tensor]:
    return [t for t in inputs.problem[: DIFFERENTIABLE[inputs.case.op]] if t is not None]


def small(text: str, dtype: torch.dtype = torch.float64) -> RowInputs:
    inputs = make_rows(RowCase(text), dtype)
    for t in leaves(inputs):
        t.requires_grad_()
    return inputs


def call(inputs: RowInputs, *tensors: Tensor) -> tuple[Tensor, ...]:
    p, rest = inputs.problem, iter(tensors)
    names = [n for n in p._fields[: DIFFERENTIABLE[inputs.case.op]] if getattr(p, n) is not None]
    return tuple(t for t in RUN[inputs.case.op](p._replace(**{n: next(rest) for n in names})) if t is not None)


@pytest.mark.parametrize("text", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_thin_path_equals_operator(text: str, dtype: torch.dtype) -> None:
    inputs = small(text, dtype)
    thin = evaluate_rows(RUN[inputs.case.op], inputs)
    with Watch():
        watched = evaluate_rows(RUN[inputs.case.op], inputs)
    for name, t in thin.items():
        assert torch.equal(t, watched[name]), name


@pytest.mark.parametrize("text", SMALL)
def test_opcheck(text: str) -> None:
    inputs = small(text)
    name, n = inputs.case.op, DIFFERENTIABLE[inputs.case.op]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    op = getattr(torch.ops.fusedseq, name).default
    torch.library.opcheck(op, (*inputs.problem, registry.forced()), test_utils=checks)
    upstream = [*inputs.upstream, *([None] if name == "layer_norm" and len(inputs.upstream) == 1 else [])]
    needs = [t is not None for t in inputs.problem[:n]]
    op = getattr(torch.ops.fusedseq, f"{name}_backward").default
    torch.library.opcheck(op, (*upstream, *inputs.problem, needs, registry.forced()), test_utils=checks)


@pytest.mark.parametrize("text", SMALL)
def test_gradcheck_twice(text: str) -> None:
    inputs = small(text)
    assert torch.autograd.gradcheck(lambda *t: call(inputs, *t), leaves(inputs))
    assert torch.autograd.gradgradcheck(lambda *t: call(inputs, *t), leaves(inputs))


@pytest.mark.parametrize("text", SMALL)
def test_compile(text: str) -> None:
    inputs = small(text, torch.float32)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        return call(inputs, *tensors)

    plain, compiled = (f(*leaves(inputs)) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))
    for results in zip(plain, compiled, strict=True):
        assert torch.equal(*results)
    for grads in zip(*(torch.autograd.grad(o, leaves(inputs), inputs.upstream) for o in (plain, compiled)),
                     strict=True):  # fmt: skip
        assert torch.equal(*grads)


@pytest.mark.parametrize("mapped", [("x",), ("residual",), ("x", "residual"), ("bias",), ("x", "bias")], ids="-".join)
@pytest.mark.parametrize("op", RUN)
def test_vmap_and_per_example_gradients(op: str, mapped: tuple[str, ...]) -> None:
    words = {"layer_norm": "residual-weight-bias", "bias_activation": "bias-residual-gelu"}[op]
    p = make_rows(RowCase(f"{op}-4x6-{words}"), torch.float64).problem
    full = {name: torch.stack([getattr(p, name) * (i + 1) for i in range(3)]) for name in mapped}

    def loss(some: dict[str, Tensor], bias: Tensor) -> Tensor:
        return RUN[op](p._replace(**{"bias": bias, **some}))[0].square().sum()

    both = torch.func.grad(loss, argnums=(0, 1))
    got = torch.vmap(both, (0, None))(full, p.bias)
    for i in range(3):
        want = both({name: t[i] for name, t in full.items()}, p.bias)
        torch.testing.assert_close(torch.utils._pytree.tree_map(lambda t, i=i: t[i], got), want)


@pytest.mark.parametrize("text", SMALL)
def test_forward_mode(text: str) -> None:
    inputs = make_rows(RowCase(text), torch.float64)
    primals = tuple(leaves(inputs))
    tangents = tuple(torch.randn_like(t) for t in primals)
    _, got = torch.func.jvp(lambda *t: call(inputs, *t), primals, tangents)
    with use_backend("reference"):
        _, pull = torch.func.vjp(lambda *t: call(inputs, *t), *primals)
        upstream = tuple(inputs.upstream)
        pairs = zip(pull(upstream), tangents, strict=True)
        want = sum((a * b).sum() for a, b in pairs)
    torch.testing.assert_close(sum((a * b).sum() for a, b in zip(got, upstream, strict=True)), want)


def test_autocast() -> None:
    x, wide, bias = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(4, 8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = residual_dropout_layer_norm(x, wide, bias=bias)
        half = bias_activation_dropout(x, bias, activation="gelu")
        with Watch():
            assert torch.equal(out, residual_dropout_layer_norm(x, wide, bias=bias))
            assert torch.equal(half, bias_activation_dropout(x, bias, activation="gelu"))
    assert out.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert torch.equal(out, residual_dropout_layer_norm(x.float(), wide, bias=bias))


@pytest.mark.parametrize("text", [SMALL[0], SMALL[3]])
def test_gradients_only_where_wanted(text: str) -> None:
    inputs = small(text, torch.float32)
    every = torch.autograd.grad(call(inputs, *leaves(inputs)), leaves(inputs), inputs.upstream)
    for i, want in enumerate(every):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves(inputs))]
        (got,) = torch.autograd.grad(call(inputs, *some), [some[i]], inputs.upstream)
        assert torch.equal(got, want)


def test_only_the_sum_has_a_gradient_and_inputs_are_watched() -> None:
    inputs = small(SMALL[0])
    _, total = call(inputs, *leaves(inputs))
    dx, dresidual, dweight, _ = torch.autograd.grad(total.sum(), leaves(inputs), allow_unused=True)
    assert torch.equal(dresidual, torch.ones_like(dresidual)) and not dweight.any()
    assert set(dx.unique().tolist()) <= {0.0, 1 / 0.7}
    out = residual_dropout_layer_norm(inputs.problem.x, inputs.problem.residual)
    with torch.no_grad():
        inputs.problem.residual.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x: expected a tensor, got list"),
        ({"x": torch.tensor(1.0)}, r"x: expected at least one dimension \[..., d\], got \[\]"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, "x: expected dtype float32, .*got torch.int64"),
        ({"residual": torch.ones(4)}, r"residual: expected shape \[3, 4\], got \[4\]"),
        ({"bias": torch.ones(3)}, r"bias: expected shape \[4\], got \[3\]"),
        ({"bias": 1.0}, "bias: expected a tensor or None, got float"),
        ({"bias": torch.ones(4).double()}, "bias: expected dtype torch.float32, that of x, got torch.float64"),
        ({"bias": torch.ones(4, device="meta")}, "bias: expected device cpu, that of x, got meta"),
        ({"dropout_p": 1.5}, "dropout_p: expected a probability between 0 and 1, got 1.5"),
        ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected one integer"),
        ({"weight": torch.ones(5)}, r"weight: expected shape \[4\], got \[5\]"),
        ({"eps": -1.0}, "eps: expected a number of at least 0, got -1.0"),
        ({"activation": "mish"}, "activation: expected one of identity, relu, .*got 'mish'"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(3, 4), **change}
    for function, foreign in (
        (residual_dropout_layer_norm, {"activation"}), (bias_activation_dropout, {"weight", "eps"})
    ):  # fmt: skip
        if not foreign & change.keys():
            with pytest.raises((ValueError, TypeError), match=message):
                function(**given)
