"""Attention that repeats takes a short way past all checks: with the same bits, and only where nothing watches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedseq
from fusedseq import Mask, registry
from fusedseq.ops import ArgumentTypeError, ArgumentValueError, attention_repeat

pytestmark = pytest.mark.skipif(
    registry.backends()["cpu"].missing() is not None, reason="the compiled core is not there"
)


@pytest.fixture(autouse=True)
def forgotten():
    attention_repeat._known.clear()


def draw(B=2, Hq=4, Hkv=2, L=3, S=37, E=24, Ev=None, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev or E))
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)  # type: ignore[return-value]


class Count:
    """How often what is remembered was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        recall = attention_repeat.recall

        def counted(p):
            result = recall(p)
            self.taken += result is not None
            return result

        monkeypatch.setattr(attention_repeat, "recall", counted)


@pytest.fixture
def count(monkeypatch):
    return Count(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("L", [1, 3, 33])
@pytest.mark.parametrize(
    "more", [{}, {"mask": Mask("bottom-right")}, {"mask": Mask(window=(5, 2))}, {"softcap": 3.0, "scale": -0.5}]
)
def test_the_same_bits(count, dtype, L, more):
    q, k, v = draw(L=L, Ev=16, dtype=dtype)
    first = fusedseq.attention(q, k, v, return_lse=True, **more)
    assert count.taken == 0
    q2, k2, v2 = (t.clone() for t in (q, k, v))
    second = fusedseq.attention(q2, k2, v2, return_lse=True, **more)
    assert count.taken == 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.dtype is b.dtype and a.stride() == b.stride()


def test_results_are_memory_of_their_own(count):
    q, k, v = draw()
    a, b, c = (fusedseq.attention(q, k, v) for _ in range(3))
    assert count.taken == 2 and len({t.data_ptr() for t in (a, b, c)}) == 3
    assert a.is_contiguous() and b.is_contiguous()


def test_strides_may_change(count):
    q, k, v = draw(L=9)
    expected = fusedseq.attention(q, k, v)
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = fusedseq.attention(q2, k, v)
    assert count.taken == 1 and torch.equal(out, expected) and out.stride() == q2.stride()
    sparse = torch.stack((k, k), -1).flatten(-2)[..., ::2]  # elements of a head apart: copied, the long way
    assert sparse.stride(3) == 2
    assert torch.equal(fusedseq.attention(q, sparse, v), expected) and count.taken == 1


def test_what_differs_is_not_taken_for_the_same(count):
    q, k, v = draw()
    fusedseq.attention(q, k, v)
    fusedseq.attention(q, k, v, scale=0.5)
    fusedseq.attention(q, k, v, softcap=2.0)
    fusedseq.attention(q, k, v, mask=Mask("top-left"))
    fusedseq.attention(q, k, v, mask=Mask(key_lengths=torch.tensor([3, 37])))
    fusedseq.attention(q, k, v, bias=torch.zeros(3, 37))
    fusedseq.attention(q, k, v, dropout_p=0.5)
    fusedseq.attention(q.double(), k.double(), v.double())
    fusedseq.attention(q[:, :2], k, v)
    fusedseq.attention(q, k[:, :, :36], v[:, :, :36])
    assert count.taken == 0


def test_errors_stay_errors():
    q, k, v = draw()
    for _ in range(3):
        fusedseq.attention(q, k, v)
        with pytest.raises(ArgumentTypeError, match="k: expected dtype"):
            fusedseq.attention(q, k.double(), v)
        with pytest.raises(ArgumentValueError, match="v: expected shape"):
            fusedseq.attention(q, k, v[:, :, 1:])


def test_gradients_are_recorded(count):
    q, k, v = draw()
    for _ in range(2):
        fusedseq.attention(q, k, v)
    assert count.taken == 1
    for t in (q, k, v):
        t.requires_grad_()
        out = fusedseq.attention(q, k, v)
        assert out.requires_grad
        t.requires_grad_(False)
    assert count.taken == 3  # the first that records is a call of its own
    q.requires_grad_()
    with torch.no_grad():
        assert not fusedseq.attention(q, k, v).requires_grad
    assert count.taken == 4


def gradients(inputs: tuple[Tensor, ...], wanted: tuple[int, ...], dout: Tensor, dlse: Tensor | None, **more):
    """out, lse and the wanted gradients, of a first call and of one that is remembered."""
    results = []
    for _ in range(2):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        out, lse = fusedseq.attention(*leaves, return_lse=True, **more)
        outputs, upstream = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
        results.append((out, lse, *torch.autograd.grad(outputs, [leaves[i] for i in wanted], upstream)))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("more", [{}, {"mask": Mask("top-left")}, {"softcap": 3.0, "scale": -0.5}])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (0, 2)])
@pytest.mark.parametrize("with_lse", [False, True])
def test_the_same_gradients(count, dtype, more, wanted, with_lse):
    inputs = draw(L=33, Ev=16, dtype=dtype)
    dout = torch.randn(2, 4, 33, 16).to(dtype)
    dlse = torch.randn(2, 4, 33, dtype=torch.promote_types(dtype, torch.float32)) if with_lse else None
    first, second = gradients(inputs, wanted, dout, dlse, **more)
    assert count.taken == 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.dtype is b.dtype and a.stride() == b.stride()


def test_gradients_whatever_the_strides(count):
    inputs = draw(L=9)
    dout = torch.randn(2, 4, 9, 24)
    expected = gradients(inputs, (0, 1, 2), dout, None)[0][2:]
    assert count.taken == 1
    apart = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs)
    sparse = torch.stack((dout, dout), -1).flatten(-2)[..., ::2]
    for given_inputs, given_dout in ((apart, dout), (inputs, dout.transpose(1, 2).contiguous().transpose(1, 2)),
                                     (apart, sparse)):  # fmt: skip
        for got in gradients(given_inputs, (0, 1, 2), given_dout, None):
            for a, b, t in zip(got[2:], expected, given_inputs, strict=True):
                assert torch.equal(a, b) and a.stride() == t.stride()
    assert count.taken == 7
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    fusedseq.attention(q, k, v).sum().backward()  # an upstream gradient without memory of its own
    dense = gradients(inputs, (0, 1, 2), torch.ones(2, 4, 9, 24), None)[1]
    assert torch.equal(q.grad, dense[2]) and torch.equal(k.grad, dense[3]) and torch.equal(v.grad, dense[4])


def test_gradients_of_gradients(count):
    q, k, v = (t.requires_grad_() for t in draw(B=1, Hq=2, Hkv=1, L=3, S=4, E=3, dtype=torch.float64))
    fusedseq.attention(q, k, v)
    assert torch.autograd.gradgradcheck(fusedseq.attention, (q, k, v))
    out = fusedseq.attention(q, k, v)
    rows = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    (many,) = torch.autograd.grad(out, q, rows, is_grads_batched=True, retain_graph=True)
    for row, dq in zip(rows, many, strict=True):
        torch.testing.assert_close(torch.autograd.grad(out, q, row, retain_graph=True)[0], dq)
    assert count.taken > 2


def test_whoever_watches_sees_the_call(count):
    q, k, v = draw()
    for _ in range(2):
        expected = fusedseq.attention(q, k, v)
    assert count.taken == 1
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        fusedseq.attention(q, k, v)
    assert "fusedseq.attention.default" in seen
    mapped = torch.func.vmap(fusedseq.attention)(q[None], k[None], v[None])
    torch.testing.assert_close(mapped[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert fusedseq.attention(q, k, v).dtype is torch.bfloat16
    assert count.taken == 1
    assert "cpu" in str(fusedseq.explain(fusedseq.attention, q, k, v)) and count.taken == 1


def test_a_named_backend_is_the_one_that_runs(count, monkeypatch):
    q, k, v = draw()
    for _ in range(2):
        fusedseq.attention(q, k, v)
    reference = registry.backends()["reference"]
    runs = []
    monkeypatch.setattr(reference, "attention_forward", lambda p, f=reference.attention_forward: runs.append(1) or f(p))
    with fusedseq.use_backend("reference"):
        for _ in range(2):
            fusedseq.attention(q, k, v)
    assert len(runs) == 2 and count.taken == 1
    fusedseq.attention(q, k, v)
    assert count.taken == 2


def test_sdpa_takes_it_too(monkeypatch):
    from fusedseq.ops import sdpa

    taken = []
    monkeypatch.setattr(sdpa, "recall", lambda p, f=sdpa.recall: taken.append(f(p)) or taken[-1])
    q, k, v = draw()
    for causal in (False, True):
        first = fusedseq.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        assert taken[-1] is None
        second = fusedseq.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        assert taken[-1] is not None and torch.equal(first, second)
    with pytest.raises(RuntimeError):  # torch's: heads differ and enable_gqa was not asked for
        fusedseq.scaled_dot_product_attention(q, k, v)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(attention_repeat, "_LIMIT", 8)
    q, k, v = draw(S=40)
    for n in range(1, 40):
        fusedseq.attention(q, k[:, :, :n], v[:, :, :n])
        assert len(attention_repeat._known) <= 8
