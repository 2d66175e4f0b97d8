"""Linear layers on our packed products: torch's results, errors and derivatives, rows apart from each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedseq
from fusedseq import registry
from fusedseq.ops.linear import linear, takes
from fusedseq.testing.compare import judge

pytestmark = pytest.mark.skipif(
    registry.backends()["cpu"].missing() is not None, reason="the compiled core is not there"
)
# (M, N, K): below, at and past all sizes that a product is cut by (16 lanes, panels of 64, 96 and 768 rows, 256 words).
SIZES = [(64, 128, 128), (67, 131, 121), (97, 1, 10900), (1100, 65, 33), (769, 16, 257), (300, 513, 64), (2500, 7, 100)]
DTYPES = {"f32": torch.float32, "f64": torch.float64}


def draw(M: int, N: int, K: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias and the upstream gradient."""
    g = torch.Generator().manual_seed(M + N + K)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((M, K), (N, K), (N,), (M, N))]


def outcome(function, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    inputs = {"dx": x, "dweight": weight} | ({} if bias is None else {"dbias": bias})
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y = function(*leaves.values())
    y.backward(dy)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.fixture
def isas() -> Iterator[list[str]]:
    from fusedseq import _cpu

    before = _cpu.isa()
    yield list(_cpu.isas())
    _cpu.set_isa(before)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_parity_on_every_isa(isas, size, dtype, with_bias) -> None:
    from fusedseq import _cpu

    x, weight, bias, dy = draw(*size, dtype)
    given = (x, weight, bias if with_bias else None)
    assert takes(*given)
    truth = outcome(F.linear, *(None if t is None else t.double() for t in given), dy.double())
    peer = outcome(F.linear, *given, dy)
    for isa in isas:
        _cpu.set_isa(isa)
        errors = judge(outcome(linear, *given, dy), truth, peer, dtype, max(size))
        assert all(error.ok for error in errors), (isa, [str(e) for e in errors if not e.ok])


def test_the_measure_rejects_what_is_wrong() -> None:
    x, weight, bias, dy = draw(300, 70, 65, torch.float32)
    truth = outcome(F.linear, x.double(), weight.double(), bias.double(), dy.double())
    good, peer = outcome(linear, x, weight, bias, dy), outcome(F.linear, x, weight, bias, dy)
    for name, t in good.items():
        for spoil in (lambda t: t * 1.001, lambda t: t.roll(1, -1)):
            assert not all(error.ok for error in judge(good | {name: spoil(t)}, truth, peer, torch.float32, 300)), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_neither_threads_nor_other_rows_matter(dtype) -> None:
    x, weight, bias, dy = draw(1700, 200, 300, dtype)
    both = outcome(linear, x, weight, bias, dy)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            alone = outcome(linear, x, weight, bias, dy)
        finally:
            torch.set_num_threads(2)
        for name, t in both.items():
            assert torch.equal(t, alone[name]), (threads, name)
    part = outcome(linear, x[500:600], weight, bias, dy[500:600])
    assert torch.equal(part["y"], both["y"][500:600]) and torch.equal(part["dx"], both["dx"][500:600])


def test_strides() -> None:
    x, weight, bias, dy = draw(60, 96, 80, torch.float64)  # rounding has no say here
    wide = torch.full((60, 4, 200), float("nan"), dtype=x.dtype)
    wide[..., :80] = x.unsqueeze(1)
    dense = x.unsqueeze(1).repeat(1, 4, 1)
    views = {
        "rows apart": wide[..., :80],
        "transposed": dense.transpose(0, 1).contiguous().transpose(0, 1),
        "elements apart": torch.stack((dense, dense * float("nan")), -1).flatten(-2)[..., ::2],
        "one row": x[:1].expand(240, 80),
    }
    up = dy.unsqueeze(1).repeat(1, 4, 1)
    for name, view in views.items():
        assert takes(view, weight, bias), name
        grad = up.flatten(0, 1) if name == "one row" else up
        want = outcome(F.linear, view.contiguous(), weight, bias, grad)
        leaf, w = view.detach().requires_grad_(), weight.t().contiguous().t().requires_grad_()
        y = linear(leaf, w, bias)
        y.backward(grad.transpose(0, -1).contiguous().transpose(0, -1))
        for got, key in ((y, "y"), (leaf.grad, "dx"), (w.grad, "dweight")):
            torch.testing.assert_close(got, want[key], msg=lambda m, name=name, key=key: f"{name} {key}: {m}")


def test_only_what_is_wanted_is_computed(monkeypatch) -> None:
    from fusedseq.backends import cpu_rows

    asked = []
    backward = cpu_rows.linear_backward
    monkeypatch.setattr(
        cpu_rows, "linear_backward", lambda dy, x, w, needs: asked.append(needs) or backward(dy, x, w, needs)
    )
    x, weight, bias, dy = draw(64, 128, 128, torch.float32)
    linear(x, weight, bias.requires_grad_()).backward(dy)
    linear(x.requires_grad_(), weight).backward(dy)
    assert [tuple(needs) for needs in asked] == [(False, False, True), (True, False, False)]
    assert not linear(x.detach(), weight, bias.detach()).requires_grad


def test_second_derivatives() -> None:
    x, weight, bias, _ = (t.requires_grad_() for t in draw(64, 130, 128, torch.float64))
    assert takes(x, weight, bias)
    results = []
    for function in (linear, F.linear):
        (dx, dw) = torch.autograd.grad(function(x, weight, bias).sin().sum(), (x, weight), create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, weight, bias)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_transforms_are_torchs() -> None:
    x, weight, bias, dy = draw(64, 128, 130, torch.float32)

    def loss(w: Tensor) -> Tensor:
        return (linear(x, w, bias) * dy).sum()

    torch.testing.assert_close(torch.func.grad(loss)(weight), dy.t() @ x)
    assert torch.func.vmap(linear, (0, None, None))(x[None], weight, bias).shape == (1, 64, 128)
    _, tangent = torch.func.jvp(lambda t: linear(t, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, x @ weight.t())
    y = linear(x, weight.requires_grad_(), bias)
    (rows,) = torch.autograd.grad(y, weight, torch.stack((dy, 2 * dy)), is_grads_batched=True)
    torch.testing.assert_close(rows[1], 2 * rows[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
    with fusedseq.use_backend("reference"):
        assert not takes(x, weight, bias)


def test_whoever_watches_sees_torchs_operator() -> None:
    x, weight, bias, _ = draw(64, 128, 130, torch.float32)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        linear(x, weight, bias)
    assert any("addmm" in name or "linear" in name for name in seen)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, w, b: (x[:, 1:], w, b),
        lambda x, w, b: (x, w.double(), b),
        lambda x, w, b: (x, w, b[1:]),
        lambda x, w, b: (x, w[0, 0], b),
        lambda x, w, b: (x.int(), w, b),
        lambda x, w, b: (None, w, b),
    ],
)
def test_errors_are_torchs(spoil) -> None:
    args = spoil(*draw(64, 128, 130, torch.float32)[:3])
    with pytest.raises((RuntimeError, TypeError)) as want:
        F.linear(*args)
    with pytest.raises(type(want.value)) as got:
        linear(*args)
    assert str(got.value) == str(want.value)


def test_nothing_in_it() -> None:
    for M, N, K in ((0, 8, 8), (8, 0, 8), (8, 8, 0)):
        y = linear(torch.zeros(M, K), torch.zeros(N, K), torch.ones(N))
        assert y.shape == (M, N) and (y == 1).all()


def test_the_layers_use_it(monkeypatch) -> None:
    from fusedseq.backends import cpu_rows

    sizes = []
    forward = cpu_rows.linear_forward
    monkeypatch.setattr(cpu_rows, "linear_forward", lambda x, w, b: sizes.append(tuple(w.shape)) or forward(x, w, b))
    layer = fusedseq.TransformerEncoderLayer(64, 2, 256, batch_first=True)
    layer(torch.randn(4, 32, 64))
    assert sizes == [(192, 64), (64, 64), (256, 64), (64, 256)]
    sizes.clear()
    layer.linear2.register_forward_hook(lambda m, args, out: out + 1)
    layer(torch.randn(4, 32, 64))
    assert sizes == [(192, 64), (64, 64), (256, 64)]
