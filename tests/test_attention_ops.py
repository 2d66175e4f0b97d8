"""Attention under everything that PyTorch does to an operator: autograd, compilation, transforms, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusedseq import Mask, attention, registry, scaled_dot_product_attention, use_backend
from fusedseq.ops.attention import run
from fusedseq.reference import attention as specification
from fusedseq.testing import cpu_backends
from fusedseq.testing.attention_cases import AttentionCase, AttentionInputs, make_attention

USABLE = cpu_backends()
SMALL = (
    "B2H4K2L3S5E4V3-causal-bias-lse",
    "B2H2L4S4E4-lengths-sinks-alibi-softcap-blhe-lse",
    "B1H2L6S7E4-packed-dropout-lse",
    "B2H2L4S6E4-left1-right1-global-dense-biasS-lse",
)


@pytest.fixture(params=USABLE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    torch._dynamo.reset()
    with use_backend(request.param):
        yield request.param


class Watch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def small(text: str, dtype: torch.dtype = torch.float64) -> AttentionInputs:
    inputs = make_attention(AttentionCase(text), dtype)
    for t in inputs.problem.inputs():
        if t is not None:
            t.requires_grad_()
    return inputs


def leaves(inputs: AttentionInputs) -> list[Tensor]:
    return [t for t in inputs.problem.inputs() if t is not None]


def gradients(inputs: AttentionInputs, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves(inputs), [inputs.dout, inputs.dlse])


def with_leaves(inputs: AttentionInputs, tensors: tuple[Tensor, ...]) -> specification.Problem:
    rest = iter(tensors)
    return inputs.problem._replace(
        **{name: next(rest) for name in specification.Problem._fields[:6] if getattr(inputs.problem, name) is not None}
    )


@pytest.mark.parametrize("text", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_thin_path_equals_operator(text: str, dtype: torch.dtype) -> None:
    inputs = small(text, dtype)
    thin = run(inputs.problem)
    with Watch():
        watched = run(inputs.problem)
    assert thin[0].grad_fn.name() == "AttentionBackward" and watched[0].grad_fn.name() == "_AttentionBackward"
    with torch.no_grad():
        plain = run(inputs.problem)
    for a, b, c in zip(thin, watched, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for a, b in zip(gradients(inputs, thin), gradients(inputs, watched), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("text", SMALL)
def test_opcheck(text: str) -> None:
    inputs = small(text)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    args = (*inputs.problem, True, registry.forced())
    torch.library.opcheck(torch.ops.fusedseq.attention.default, args, test_utils=checks)
    out, lse = (t.detach() for t in run(inputs.problem))
    needs = [t is not None for t in inputs.problem.inputs()]
    backward = (inputs.dout, inputs.dlse, *inputs.problem, out, lse, needs, registry.forced())
    torch.library.opcheck(torch.ops.fusedseq.attention_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("text", SMALL)
def test_gradcheck_twice(text: str) -> None:
    inputs = small(text)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = run(with_leaves(inputs, tensors))
        return out, torch.where(lse == float("-inf"), 0.0, lse)

    assert torch.autograd.gradcheck(call, leaves(inputs), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves(inputs), fast_mode=True)


@pytest.mark.parametrize("text", SMALL)
def test_compile(text: str) -> None:
    inputs = small(text, torch.float32)
    outputs, compiled = run(inputs.problem), torch.compile(run, fullgraph=True, backend="aot_eager")(inputs.problem)
    for a, b in zip((*outputs, *gradients(inputs, outputs)), (*compiled, *gradients(inputs, compiled)), strict=True):
        assert torch.equal(a, b)


def test_compile_public_functions() -> None:
    q, k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([9, 4])

    def both(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = Mask("bottom-right", (4, None), key_lengths=lengths)
        return attention(q, k, v, mask=mask, softcap=5.0), scaled_dot_product_attention(q, k, v, is_causal=True)

    for dynamic in (False, True):
        compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
        got, expected = compiled(q, k, v, lengths), both(q, k, v, lengths)
        torch.testing.assert_close(got, expected)
        slopes = (torch.autograd.grad(a.sum() + b.square().sum(), q) for a, b in (got, expected))
        torch.testing.assert_close(*slopes)


def test_export_and_meta() -> None:
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, mask=Mask("top-left"))

    exported = torch.export.export(Layer(), (q, k, v))
    assert torch.equal(exported.module()(q, k, v), Layer()(q, k, v))
    assert attention(*(t.to("meta") for t in (q, k, v))).shape == q.shape


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "qkv"])
@pytest.mark.parametrize("biased", [False, True])
def test_vmap(name: str, biased: bool) -> None:
    tensors = {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 2, 6, 8), "v": torch.randn(2, 2, 6, 8)}
    if biased or name == "bias":
        tensors["bias"] = torch.randn(1, 4, 5, 6)
    mapped = [n for n in tensors if n in name or n == name]
    stacked = {n: torch.stack([t * (i + 1) for i in range(3)]) if n in mapped else t for n, t in tensors.items()}

    def call(some: dict[str, Tensor]) -> tuple[Tensor, ...]:
        def f(q: Tensor) -> Tensor:
            return attention(q, some["k"], some["v"], bias=some.get("bias"), mask=Mask("top-left"))

        out, back = torch.func.vjp(f, some["q"])
        return out, *back(torch.ones_like(out))

    got = torch.vmap(call, ({n: 0 if n in mapped else None for n in tensors},))(stacked)
    each = [call({n: t[i] if n in mapped else t for n, t in stacked.items()}) for i in range(3)]
    for a, bs in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(bs))


def test_torch_func() -> None:
    inputs = small(SMALL[0])
    p = inputs.problem
    w = torch.randn_like(inputs.dout)

    def loss(q: Tensor, function: Any = run) -> Tensor:
        return (function(p._replace(q=q))[0] * w).sum()

    def spec(q: Tensor) -> Tensor:
        return loss(q, specification.forward)

    q, close = p.q.detach(), torch.testing.assert_close
    p = p._replace(k=p.k.detach(), v=p.v.detach(), bias=p.bias.detach())
    close(torch.func.grad(loss)(q), torch.func.grad(spec)(q))
    close(torch.func.hessian(loss)(q), torch.func.hessian(spec)(q))
    tangent = torch.randn_like(q)
    close(torch.func.jvp(loss, (q,), (tangent,)), torch.func.jvp(spec, (q,), (tangent,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3))
    expected = attention(*(t.detach().to(dtype) for t in (q, k, v)), mask=Mask("top-left"))
    with torch.autocast("cpu", dtype):
        thin = attention(q, k, v, mask=Mask("top-left"))
        with Watch():
            watched = attention(q, k, v, mask=Mask("top-left"))
        drop_in = scaled_dot_product_attention(q, k, v, is_causal=True)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v, mask=Mask("top-left"))
        assert attention(*(t.double() for t in (q, k, v))).dtype == torch.float64
    for out in (thin, watched, drop_in, compiled):
        assert torch.equal(out, expected)
        assert {g.dtype for g in torch.autograd.grad(out.sum(), (q, k, v))} == {torch.float32}


@pytest.mark.parametrize("wanted", [["q"], ["k"], ["v"], ["bias"], ["sinks", "alibi_slopes"], ["q", "v"]])
def test_gradients_only_where_wanted(wanted: list[str]) -> None:
    inputs = make_attention(AttentionCase("B2H4K2L9S11E8-bias-alibi-sinks-lse"), torch.float32)
    full, some = ({n: t.detach().clone() for n in ("q", "k", "v", "bias", "alibi_slopes", "sinks")
                   if (t := getattr(inputs.problem, n)) is not None} for _ in range(2))  # fmt: skip
    for t in full.values():
        t.requires_grad_()
    for name in wanted:
        some[name].requires_grad_()
    for tensors in (full, some):
        out, lse = run(inputs.problem._replace(**tensors))
        torch.autograd.backward([out, lse], [inputs.dout, inputs.dlse])
    for name, t in some.items():
        assert (t.grad is not None) == (name in wanted)
        assert t.grad is None or torch.equal(t.grad, full[name].grad), name


def test_inference_mode_hooks_and_changed_inputs() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        assert torch.equal(attention(q, k, v), attention(q, k, v).clone())
    out = attention(q, k, v)
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
