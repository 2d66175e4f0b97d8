"""The operators under everything that PyTorch does to an operator: autograd, compilation, transforms, autocast."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusedseq import ops, registry, use_backend
from fusedseq.ops import derivative
from fusedseq.reference import scan as specification
from fusedseq.testing import cpu_backends
from fusedseq.testing.cases import CELLS, Case, Inputs, make_inputs

SMALL = (
    "T3B2I3H4-bi",
    "T4B3I2H3-bf-lengths0-cells",
    "T3B3I2H3-packed-resets-bi-cells",
    "T2B2I3H4-nobias-nostate-proj3",
)
USABLE = cpu_backends()


@pytest.fixture(params=USABLE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    torch._dynamo.reset()  # each test compiles the same function anew, which dynamo allows only so often
    with use_backend(request.param):
        yield request.param


class Watch(TorchFunctionMode):
    """Changes nothing, but being there takes a call off the thin path."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def differentiable(inputs: Inputs) -> list[Tensor]:
    """The tensors of a case that can have a gradient, now asking for it."""
    tensors = [t for t in (inputs.x, inputs.h0, inputs.c0, *inputs.weights) if t is not None]
    return [t.requires_grad_() for t in tensors]


def present(outputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(t for t in outputs if t is not None)


def run(inputs: Inputs, scan: Callable[..., Any] = ops.scan) -> tuple[Tensor, ...]:
    out = scan(inputs.case.cell, inputs.x, inputs.h0, inputs.c0, inputs.weights, **inputs.keywords())
    return present(out)


def gradients(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, differentiable(inputs), list(inputs.upstream.values()))


def case_ids(cells: tuple[str, ...] = CELLS, texts: tuple[str, ...] = SMALL) -> list[Any]:
    cases = dict.fromkeys(Case.parse(cell, text) for cell in cells for text in texts)
    return [pytest.param(case, id=f"{case.cell}-{case}") for case in cases]


def small(cell: str = "lstm", text: str = "T3B2I2H3", dtype: torch.dtype = torch.float64) -> Inputs:
    return make_inputs(Case.parse(cell, text), dtype)


def op_args(inputs: Inputs, save: bool) -> tuple[Any, ...]:
    case = inputs.case
    return (
        case.cell, inputs.x, inputs.h0, inputs.c0, inputs.weights, case.bidirectional, case.batch_first,
        inputs.lengths, inputs.batch_sizes, inputs.resets, case.cells, save, case.B,
        registry.forced(),
    )  # fmt: skip


@pytest.mark.parametrize("case", case_ids())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_thin_path_equals_operator(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    differentiable(inputs)
    thin = run(inputs)
    with Watch():
        watched = run(inputs)
    assert {t.grad_fn.name() for t in thin} == {"ScanBackward"}
    assert {t.grad_fn.name() for t in watched} == {"_ScanBackward"}
    for a, b in zip(thin, watched, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(inputs, thin), gradients(inputs, watched), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(thin, run(inputs), strict=True):
            assert torch.equal(a, b)
            assert b.grad_fn is None


@pytest.mark.parametrize("case", case_ids(texts=("T1B3I4H5", "T1B2I3H4-nobias-nostate-proj3")))
def test_cell_equals_one_step(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    tensors = differentiable(inputs)
    _, h_n, c_n, _ = ops.scan(case.cell, inputs.x, inputs.h0, inputs.c0, inputs.weights)
    h, c = (None if s is None else s[0] for s in (inputs.h0, inputs.c0))
    for watched in (False, True):
        if watched:
            with Watch():
                h_new, c_new = ops.cell(case.cell, inputs.x[0], h, c, inputs.weights)
        else:
            h_new, c_new = ops.cell(case.cell, inputs.x[0], h, c, inputs.weights)
        step, scan = present((h_new, c_new)), present((h_n, c_n))
        for a, b in zip(step, scan, strict=True):
            assert torch.equal(a, b[0])
        upstream = [torch.randn_like(t) for t in scan]
        got = torch.autograd.grad(step, tensors, [u[0] for u in upstream], retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(scan, tensors, upstream, retain_graph=True), strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(ops.cell(case.cell, inputs.x[0], h, c, inputs.weights)[0], h_n[0])


@pytest.mark.parametrize("case", case_ids(("lstm",)) + case_ids(("gru", "rnn_relu"), SMALL[:1]))
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(case: Case, save: bool) -> None:
    inputs = make_inputs(case, torch.float64)
    if save:
        differentiable(inputs)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if save and inputs.lengths is not None:
        checks.pop()  # it compares all outputs, and no backend writes the reserve of a step that does not happen
    torch.library.opcheck(torch.ops.fusedseq.scan.default, op_args(inputs, save), test_utils=checks)


@pytest.mark.parametrize("case", case_ids(("lstm",), SMALL[1:3]) + case_ids(("gru",), SMALL[:1]))
def test_opcheck_backward(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    args = op_args(inputs, True)
    y, *_, reserve = torch.ops.fusedseq.scan.default(*args)
    upstream = [inputs.upstream.get(name) for name in ("y", "h_n", "c_n", "c_all")]
    differentiable(inputs)
    args = (case.cell, *upstream, *args[1:10], y, reserve, True, True, *args[-2:])
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if inputs.batch_sizes is not None:
        checks.pop()  # it would trace the double backward, and the specification reads batch_sizes
    torch.library.opcheck(torch.ops.fusedseq.scan_backward.default, args, test_utils=checks)


@pytest.mark.parametrize("case", case_ids(texts=SMALL[:3]))
def test_compile(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    differentiable(inputs)
    outputs = run(inputs)
    compiled = run(inputs, torch.compile(ops.scan, fullgraph=True, backend="aot_eager"))
    for a, b in zip(outputs, compiled, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(inputs, outputs), gradients(inputs, compiled), strict=True):
        assert torch.equal(a, b)


def test_compile_inductor() -> None:
    inputs = small("gru", dtype=torch.float32)
    differentiable(inputs)
    outputs, compiled = run(inputs), run(inputs, torch.compile(ops.scan, fullgraph=True))
    torch.testing.assert_close(compiled, outputs)
    torch.testing.assert_close(gradients(inputs, compiled), gradients(inputs, outputs))


def test_compile_with_changing_sizes() -> None:
    inputs = small(dtype=torch.float32)
    calls: list[Any] = []

    def count(graph: Any, example: Any) -> Any:
        calls.append(graph)
        return graph

    compiled = torch.compile(ops.scan, fullgraph=True, dynamic=True, backend=count)
    for T, B in ((5, 4), (7, 6), (9, 8)):  # no two sizes alike at first, or they are taken for one
        args = torch.randn(T, B, 2), torch.randn(1, B, 3), torch.randn(1, B, 3), inputs.weights
        assert torch.equal(compiled("lstm", *args)[0], ops.scan("lstm", *args)[0])
    assert len(calls) == 1


def test_compiled_cell_in_a_loop() -> None:
    inputs = small("gru", dtype=torch.float32)

    def loop(x: Tensor, h: Tensor) -> Tensor:
        for t in range(x.shape[0]):
            h, _ = ops.cell("gru", x[t], h, None, inputs.weights)
        return h

    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs.x, inputs.h0[0]), loop(inputs.x, inputs.h0[0]))


def test_compiled_code_follows_use_backend() -> None:
    inputs = small(dtype=torch.float32)
    compiled = torch.compile(ops.scan, fullgraph=True, backend="eager")
    for name in (*USABLE, *reversed(USABLE)):
        with use_backend(name), registry.record() as ran:
            run(inputs, compiled)
        assert {choice.backend for choice in ran} == {name}


def test_export_and_trace() -> None:
    inputs = small(dtype=torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.scan("lstm", x, None, None, inputs.weights)[0]

    expected = Layer()(inputs.x)
    exported = torch.export.export(Layer(), (inputs.x,))
    assert torch.equal(exported.module()(inputs.x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Layer(), (inputs.x,))
    assert "fusedseq::scan" in str(traced.graph)
    assert torch.equal(traced(inputs.x + 1), Layer()(inputs.x + 1))


def test_meta_tensors() -> None:
    inputs = small("lstm", "T3B2I3H4-bi-cells")
    meta = copy.copy(inputs)
    meta.x, meta.h0, meta.c0 = (t.to("meta") for t in (inputs.x, inputs.h0, inputs.c0))
    meta.weights = [w.to("meta") for w in inputs.weights]
    assert [t.shape for t in run(meta)] == [t.shape for t in run(inputs)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("text", ["T3B2I2H2-bi-cells", "T3B2I2H3-lengths0-resets-proj2", "T3B2I1H2-packed-nostate"])
def test_gradgradcheck(cell: str, text: str) -> None:
    inputs = small(cell, text)
    names = [name for name in ("x", "h0", "c0") if getattr(inputs, name) is not None]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        one = copy.copy(inputs)
        for name, t in zip(names, tensors, strict=False):
            setattr(one, name, t)
        one.weights = list(tensors[len(names) :])
        return run(one)

    tensors = differentiable(inputs)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_gradgradcheck_of_a_cell() -> None:
    inputs = small("lstm", "T1B2I2H3")
    tensors = [t.requires_grad_() for t in (inputs.x[0], inputs.h0[0], inputs.c0[0], *inputs.weights)]
    assert torch.autograd.gradgradcheck(lambda x, h, c, *w: ops.cell("lstm", x, h, c, w), tensors, fast_mode=True)


def weighted(*outputs: Tensor | None) -> Tensor:
    """A scalar in which every element counts differently."""
    flat = torch.cat([t.flatten() for t in outputs if t is not None])
    return (flat * torch.arange(1, flat.numel() + 1, dtype=flat.dtype).sin()).sum()


def test_torch_func_derivatives() -> None:
    inputs = small("lstm", "T3B2I2H3-bi-cells")
    w = inputs.weights

    def loss(x: Tensor, w: list[Tensor]) -> Tensor:
        return weighted(*ops.scan("lstm", x, inputs.h0, inputs.c0, w, bidirectional=True, cells=True))

    def spec(x: Tensor, w: list[Tensor]) -> Tensor:
        return weighted(*specification.forward("lstm", x, inputs.h0, inputs.c0, w, bidirectional=True, cells=True))

    close = torch.testing.assert_close
    close(torch.func.grad(loss, (0, 1))(inputs.x, w), torch.func.grad(spec, (0, 1))(inputs.x, w))
    hessian = torch.func.jacrev(torch.func.jacrev(spec))(inputs.x, w)
    close(torch.func.jacrev(torch.func.jacrev(loss))(inputs.x, w), hessian)
    close(torch.func.hessian(loss)(inputs.x, w), hessian)
    close(torch.autograd.functional.hessian(lambda x: loss(x, w), inputs.x), hessian)
    tangent = torch.randn_like(inputs.x)
    close(
        torch.func.jvp(lambda x: loss(x, w), (inputs.x,), (tangent,)),
        torch.func.jvp(lambda x: spec(x, w), (inputs.x,), (tangent,)),
    )


def test_forward_mode_keeps_the_tangent() -> None:
    inputs = small()
    tangent = torch.randn_like(inputs.x)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(inputs.x, tangent)
        y = ops.scan("lstm", dual, None, None, inputs.weights)[0]
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
        plain = ops.scan("lstm", inputs.x, None, None, inputs.weights)[0]
        assert torch.autograd.forward_ad.unpack_dual(plain).tangent is None
    expected = torch.func.jvp(
        lambda x: specification.forward("lstm", x, None, None, inputs.weights)[0], (inputs.x,), (tangent,)
    )[1]
    torch.testing.assert_close(got, expected)


VMAPS = ("x", "h0", "weights", "x h0 c0", "x h0 c0 weights", "c0 upstream", "lengths x", "resets")


@pytest.mark.parametrize("names", VMAPS)
@pytest.mark.parametrize("text", ["T3B2I2H3-lengths-resets-cells", "T3B2I2H3-bf-bi", "T3B3I2H3-packed-resets"])
def test_vmap(names: str, text: str) -> None:
    V = 3
    inputs = small("lstm", text)
    batched, plain = {}, {}
    for name in ("x", "h0", "c0", "weights", "lengths", "resets", "upstream"):
        value = inputs.upstream["y"] if name == "upstream" else getattr(inputs, name)
        if value is None:
            continue
        if name not in names.split():
            plain[name] = value
        elif name == "weights":
            batched[name] = [torch.stack([w * (v + 1) / V for v in range(V)]) for w in value]
        elif value.is_floating_point():
            batched[name] = torch.stack([value * (v + 1) for v in range(V)])
        else:
            batched[name] = torch.stack([value.roll(v, 0) for v in range(V)])
    if not batched:
        batched["x"] = torch.stack([plain.pop("x")] * V)

    def call(some: dict[str, Any]) -> tuple[Any, ...]:
        full = {**plain, **some}
        upstream = full.pop("upstream")
        x, h0, c0, w = (full.pop(name) for name in ("x", "h0", "c0", "weights"))
        options = {**inputs.keywords(), **full}
        out = present(ops.scan("lstm", x, h0, c0, w, **options))
        back = torch.func.vjp(lambda x, h0, c0: ops.scan("lstm", x, h0, c0, w, **options)[0], x, h0, c0)[1]
        return out, back(upstream)

    expected = [call({k: [w[v] for w in t] if k == "weights" else t[v] for k, t in batched.items()}) for v in range(V)]
    out, back = torch.vmap(call)(batched)
    for got, each in ((out, [e[0] for e in expected]), (back, [e[1] for e in expected])):
        for a, bs in zip(got, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(bs))


def test_gradients_per_sample() -> None:
    inputs = small("gru", "T3B1I2H3-nostate")
    xs = torch.randn(4, 3, 1, 2, dtype=torch.float64)

    def loss(w: list[Tensor], x: Tensor) -> Tensor:
        return weighted(ops.scan("gru", x, None, None, w)[0])

    got = torch.vmap(torch.func.grad(loss), (None, 0))(inputs.weights, xs)
    for v in range(4):
        torch.testing.assert_close([g[v] for g in got], torch.func.grad(loss)(inputs.weights, xs[v]))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(cell: str, dtype: torch.dtype) -> None:
    inputs = small(cell, "T3B2I3H4", torch.float32)
    tensors = differentiable(inputs)
    half = [t.detach().to(dtype) for t in tensors]
    states = [None if s is None else s.detach().to(dtype) for s in (inputs.h0, inputs.c0)]
    expected = present(ops.scan(cell, half[0], *states, half[-4:]))
    with torch.autocast("cpu", dtype):
        thin = run(inputs)
        direct = present(derivative.call(*op_args(inputs, True)))
        step, _ = ops.cell(cell, inputs.x[0], None, None, inputs.weights)
        compiled = run(inputs, torch.compile(ops.scan, fullgraph=True, backend="aot_eager"))
        mixed = ops.scan(cell, inputs.x.to(dtype), None, None, inputs.weights)[0]
    assert step.dtype == mixed.dtype == dtype
    for outputs in (thin, direct, compiled):
        for a, b in zip(outputs, expected, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b)
        grads = torch.autograd.grad(outputs, tensors, [torch.ones_like(t) for t in outputs])
        assert {g.dtype for g in grads} == {torch.float32}


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert run(small())[0].dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert run(small(dtype=torch.float32))[0].dtype == torch.float32


def test_backward_twice_and_odd_upstream_gradients() -> None:
    inputs = small("lstm", "T4B3I2H5-bi")
    tensors = differentiable(inputs)
    y = run(inputs)[0]
    upstream = torch.randn(10, 3, 4, dtype=y.dtype).permute(2, 1, 0)
    first = torch.autograd.grad(y, tensors, upstream, retain_graph=True)
    second = torch.autograd.grad(y, tensors, upstream.contiguous(), retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    expanded = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(y, tensors, torch.ones_like(y)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("used", ["y", "h_n", "c_n", "c_all"])
@pytest.mark.parametrize("watched", [False, True])
def test_any_output_alone(used: str, watched: bool) -> None:
    inputs = small("lstm", "T3B2I2H3-cells")
    tensors = differentiable(inputs)
    index = ("y", "h_n", "c_n", "c_all").index(used)
    expected = torch.autograd.grad(weighted(run(inputs, specification.forward)[index]), tensors)
    if watched:
        with Watch():
            outputs = run(inputs)
    else:
        outputs = run(inputs)
    torch.testing.assert_close(torch.autograd.grad(weighted(outputs[index]), tensors), expected)


@pytest.mark.parametrize("wanted", [["x"], ["h0"], ["c0"], ["w_hh"], ["b_ih", "x"]])
def test_gradients_only_where_wanted(wanted: list[str]) -> None:
    inputs = small()
    named = dict(
        zip(["x", "h0", "c0", *inputs.weight_names()], (inputs.x, inputs.h0, inputs.c0, *inputs.weights), strict=True)
    )
    for t in (named[name] for name in wanted):
        t.requires_grad_()
    weighted(*run(inputs)).backward()
    got = {name: t.grad.clone() for name, t in named.items() if t.grad is not None}
    assert sorted(got) == sorted(wanted)
    weighted(*run(inputs, specification.forward)).backward()
    for name, grad in got.items():
        torch.testing.assert_close(named[name].grad, 2 * grad)


def test_hooks_and_changed_weights() -> None:
    inputs = small()
    differentiable(inputs)
    seen: list[str] = []
    inputs.weights[0].register_hook(lambda g: seen.append("weight"))
    y = run(inputs)[0]
    y.register_hook(lambda g: seen.append("y"))
    y.sum().backward()
    assert seen == ["y", "weight"]
    y = run(inputs)[0]
    with torch.no_grad():
        inputs.weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_mode() -> None:
    inputs = small()
    differentiable(inputs)
    with torch.inference_mode():
        y = run(inputs)[0]
    assert y.is_inference()
    assert torch.equal(y, run(inputs)[0].detach())


def test_tensor_subclass_goes_through_the_operator() -> None:
    class Tagged(Tensor):
        pass

    inputs = small()
    expected = run(inputs)[0]
    inputs.weights[0] = inputs.weights[0].as_subclass(Tagged)
    y = run(inputs)[0]
    assert isinstance(y, Tagged)
    assert torch.equal(y.as_subclass(Tensor), expected)


def test_int32_lengths() -> None:
    inputs = small("gru", "T4B3I2H3-lengths")
    expected = run(inputs)
    inputs.lengths = inputs.lengths.to(torch.int32)
    for a, b in zip(run(inputs), expected, strict=True):
        assert torch.equal(a, b)
