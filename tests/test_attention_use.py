"""What programs do with attention: autocast, compile, map, reuse graphs, overwrite inputs, call from many threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_formula import INF, Call, formula, judge, outcome
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedseq import Mask, attention, scaled_dot_product_attention, use_backend
from fusedseq.testing import cpu_backends

USABLE = cpu_backends()
torch_sdpa = F.scaled_dot_product_attention


@pytest.fixture(params=USABLE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)


def qkv(B: int, H: int, L: int, S: int, E: int, dtype: torch.dtype = torch.float64, K: int = 0) -> list[Tensor]:
    shapes = ((B, H, L, E), (B, K or H, S, E), (B, K or H, S, E))
    return [normal(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("half", ["q", "kv", "mask", "", "q mask"], ids=lambda names: names or "none")
def test_drop_in_under_autocast_with_mixed_inputs(dtype: torch.dtype, half: str) -> None:
    """A projection in the half type beside a float32 cache or mask, as a layer under autocast has them."""
    q, k, v = qkv(2, 4, 9, 9, 8, torch.float32)
    leaves = (q, k, v, normal(9, 9, seed=5).requires_grad_())
    given = [t.to(dtype) if name in half else t for name, t in zip(("q", "k", "v", "mask"), leaves, strict=True)]
    results = []
    for function in (scaled_dot_product_attention, torch_sdpa):
        with torch.autocast("cpu", dtype):
            out = function(*given[:3], attn_mask=given[3])
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 8 * torch.finfo(dtype).eps * theirs.norm()
    with torch.autocast("cpu", dtype), pytest.raises(RuntimeError, match="to have the same dtype"):
        scaled_dot_product_attention(q.double(), k, v)


def test_drop_in_put_in_the_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2, 2, 5, 7, 8)
    expected = F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    close(F.scaled_dot_product_attention(q, k, v), expected)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, dtype=torch.float64, batch_first=True)
    assert layer(normal(2, 5, 8, dtype=torch.float64)).isfinite().all()
    with pytest.raises(RuntimeError, match="mask"):
        F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 7, dtype=torch.int32))


def test_compiled_once_for_any_length() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) * 2

    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    for n in (5, 6, 70, 129):
        q, k, v = qkv(2, 4, n, n, 8, K=2)
        ours = compiled(q, k, v)
        close(ours, 2 * torch_sdpa(q, k, v, is_causal=True, enable_gqa=True))
        assert torch.autograd.grad(ours.sum(), k)[0].isfinite().all()
    assert len(graphs) == 1


@pytest.mark.parametrize("in_dims", [(0, 0, 0, None), (0, None, None, 0), (2, 0, 1, 0), (None, None, None, 0)])
def test_vmap_over_anything(in_dims: tuple[int | None, ...]) -> None:
    """Mapped over a new dimension anywhere, the bias too, forward and gradient, as a loop does."""
    base = [*qkv(2, 4, 5, 7, 8, K=2), normal(1, 4, 5, 7, seed=9, dtype=torch.float64)]
    stacked = [t if d is None else torch.stack([t * (1 + n) for n in range(3)], d).detach()
               for t, d in zip(base, in_dims, strict=True)]  # fmt: skip

    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias=bias, mask=Mask("bottom-right")).square().sum()

    values = torch.func.vmap(loss, in_dims)(*stacked)
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3)), in_dims)(*stacked)
    for n in range(3):
        one = [t if d is None else t.select(d, n) for t, d in zip(stacked, in_dims, strict=True)]
        close(values[n], loss(*one))
        for g, expected in zip(grads, torch.func.grad(loss, (0, 1, 2, 3))(*one), strict=True):
            close(g[n], expected)


def test_a_graph_used_twice() -> None:
    q, k, v = qkv(2, 2, 70, 70, 16)
    out, lse = attention(q, k, v, mask=Mask("top-left"), return_lse=True)
    first = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    only_out, only_lse = (torch.autograd.grad(t.sum(), (q, k, v), retain_graph=True, allow_unused=True)
                          for t in (out, lse))  # fmt: skip
    for whole, a, b in zip(first, only_out, only_lse, strict=True):
        close(whole, a if b is None else a + b)


def test_one_tensor_as_query_key_and_value() -> None:
    x = normal(2, 2, 70, 16, dtype=torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    attention(x, x, x).square().sum().backward()
    torch_sdpa(y, y, y).square().sum().backward()
    close(x.grad, y.grad)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "stepped", "overlapping"])
def test_upstream_gradients_in_any_layout(kind: str) -> None:
    q, k, v = qkv(2, 2, 65, 33, 16)
    shape = (2, 2, 65, 16)
    dout = {
        "expanded": torch.ones((), dtype=torch.float64).expand(shape),
        "transposed": normal(16, 65, 2, 2, dtype=torch.float64).permute(3, 2, 1, 0),
        "stepped": normal(2, 2, 130, 32, dtype=torch.float64)[:, :, ::2, ::2],
        "overlapping": normal(120, dtype=torch.float64).as_strided(shape, (3, 5, 1, 2)),
    }[kind]
    ours = torch.autograd.grad(attention(q, k, v), (q, k, v), dout)
    theirs = torch.autograd.grad(torch_sdpa(q, k, v), (q, k, v), dout.contiguous())
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks", "alibi_slopes", "out", "key_lengths", "dense"])
def test_a_saved_tensor_that_changes_is_noticed(name: str) -> None:
    call = {"q": normal(1, 2, 5, 8), "k": normal(1, 2, 7, 8, seed=1), "v": normal(1, 2, 7, 8, seed=2),
            "bias": normal(5, 7), "sinks": normal(2), "alibi_slopes": normal(2).abs()}  # fmt: skip
    masks = {"key_lengths": torch.tensor([6]), "dense": torch.ones(5, 7, dtype=torch.bool)}
    leaves = {n: t.requires_grad_() for n, t in call.items()}
    leaves["out"] = attention(**leaves, mask=Mask(**masks))
    with torch.no_grad():
        (masks | leaves)[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        leaves["out"].sum().backward()


def test_threads_may_call_at_once(backend: str) -> None:
    """Eight threads of a server, each with sizes of its own, get the bits that they get alone."""
    jobs = []
    for n in range(8):
        q, k, v = qkv(1 + n % 3, 4, 1 + 37 * n % 90, 20 + 61 * n % 200, 16, torch.float32, K=2)
        jobs.append((q, k, v, Mask("bottom-right") if n % 2 else None))

    def run(job: tuple[Any, ...]) -> list[Tensor]:
        q, k, v, mask = job
        out, lse = attention(q, k, v, mask=mask, dropout_p=0.2, seed=3, return_lse=True)
        finite = torch.where(lse == -INF, 0.0, lse)
        return [out, lse, *torch.autograd.grad(out.square().sum() + finite.sum(), (q, k, v))]

    alone = [run(job) for job in jobs]
    wrong: list[int] = []

    def work(n: int) -> None:
        with use_backend(backend):
            for _ in range(10):
                if not all(torch.equal(a, b) for a, b in zip(run(jobs[n]), alone[n], strict=True)):
                    wrong.append(n)
        done.append(n)

    done: list[int] = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(8)) and not wrong


def test_checkpointing_draws_the_same_dropout() -> None:
    q, k, v = qkv(2, 2, 30, 30, 8)
    grads = []
    for again in (False, True):
        torch.manual_seed(5)

        def layer(*tensors: Tensor) -> Tensor:
            return attention(*tensors, dropout_p=0.4)

        out = checkpoint(layer, q, k, v, use_reentrant=False) if again else layer(q, k, v)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_dropout_of_all_or_nothing() -> None:
    q, k, v = qkv(1, 2, 5, 70, 8)
    close(attention(q, k, v, dropout_p=0.0, seed=1), attention(q, k, v))
    out, lse = attention(q, k, v, dropout_p=1.0, seed=1, return_lse=True)
    assert not out.any() and torch.equal(lse, attention(q, k, v, return_lse=True)[1])
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (2, 0, 5, 7)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    B, H, L, S = shape
    q, k, v = qkv(B, H, L, S, 8)
    bias = normal(B, H, L, S, dtype=torch.float64).requires_grad_()
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    assert out.shape == (B, H, L, 8) and lse.shape == (B, H, L)
    assert not out.any() and (lse == -INF).all()
    for t, g in zip((q, k, v, bias), torch.autograd.grad(out.sum(), (q, k, v, bias)), strict=True):
        assert g.shape == t.shape and not g.any()


def test_more_pairs_than_an_int_counts(backend: str) -> None:
    """L S = 2^34 under a window of two keys, forward and backward, beside the softmax of two logits."""
    if backend == "reference":
        pytest.skip("the specification stores L x S")
    n = 2**17
    q, k, v = qkv(1, 1, n, n, 4, torch.float32)
    out = attention(q, k, v, mask=Mask("top-left", (1, None)))
    grads = torch.autograd.grad(out, (q, k, v), normal(1, 1, n, 4, seed=8))
    q2, k2, v2 = (t.detach().double().requires_grad_() for t in (q, k, v))
    before = (F.pad(t, (0, 0, 1, 0))[:, :, :-1] for t in (k2, v2))
    keys, values = (torch.stack(pair, 3) for pair in zip((k2, v2), before, strict=True))
    logits = (q2.unsqueeze(3) * keys).sum(-1) / 2
    hidden = torch.zeros(n, 2, dtype=torch.bool)
    hidden[0, 1] = True
    weights = logits.masked_fill(hidden, -INF).softmax(-1)
    expected = (weights.unsqueeze(-1) * values).sum(3)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    for a, b in zip(
        grads, torch.autograd.grad(expected, (q2, k2, v2), normal(1, 1, n, 4, seed=8).double()), strict=True
    ):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_strides_beyond_an_int() -> None:
    """Rows of a batch 2^31 elements apart; the pages between them are never touched."""
    memory = torch.from_numpy(np.zeros(2 * 2**31 + 10**5, dtype=np.int8)).view(torch.int8)
    size, step = 2 * 33 * 8, 2**30 + 17  # of float16, so 2^31 bytes and more
    halves = memory[: len(memory) // 2 * 2].view(torch.float16)
    k = halves.as_strided((2, 2, 33, 8), (step, 33 * 8, 8, 1))
    k.copy_(normal(2, 2, 33, 8, dtype=torch.float16))
    assert size < step
    q = normal(2, 2, 5, 8, seed=1, dtype=torch.float16)
    assert torch.equal(attention(q, k, k), attention(q, k.contiguous(), k.contiguous()))


def t5_bucket(distance: Tensor, buckets: int = 32, far: int = 128) -> Tensor:
    """Buckets of relative positions, half for keys to the right (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""
    half, exact = buckets // 2, buckets // 4
    size = distance.abs()
    log = exact + (size.clamp(min=1) / exact).log() / math.log(far / exact) * (half - exact)
    return (distance > 0) * half + torch.where(size < exact, size, log.long().clamp(max=half - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_bias_of_t5(dtype: torch.dtype) -> None:
    """A table of heads by buckets, its gradient gathered from every pair of the bucket over the whole batch."""
    L, S, H = 130, 190, 3
    q, k, v = (t.detach() for t in qkv(2, H, L, S, 16, dtype))
    bucket = t5_bucket(torch.arange(S) - torch.arange(L)[:, None])
    dout = normal(2, H, L, 16, seed=4, dtype=dtype)
    table = normal(32, H, seed=3)
    results = {}
    for name, function, kind in (("ours", Call.ours, dtype), ("truth", None, torch.float64)):
        weights = table.to(kind).requires_grad_()
        call = Call(q, k, v, {"bias": weights[bucket].permute(2, 0, 1).unsqueeze(0), "scale": 1.0})
        out = call.ours()[0] if function else formula(call, torch.float64)[0]
        results[name] = out.double(), torch.autograd.grad(out, weights, dout.to(out.dtype))[0].double()
    share = 8 * torch.finfo(dtype).eps
    for ours, truth in zip(results["ours"], results["truth"], strict=True):
        assert (ours - truth).norm() < share * truth.norm()
    bias = table.to(dtype)[bucket].permute(2, 0, 1).unsqueeze(0).contiguous()
    call = Call(q, k, v, {"bias": bias, "scale": 1.0})
    assert not judge(call, dout, None, outcome(call, Call.ours, dout, None))


@pytest.mark.parametrize("L", [64, 192, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_very_negative_logits_stay_finite(L: int, dtype: torch.dtype) -> None:
    """Rows whose every logit is near -1e4, at L % 128 = 64 (pytorch#196678), by a mask and by the products."""
    q, k, v = (t.detach() for t in qkv(1, 2, L, L, 64, dtype))
    mask = torch.full((L, L), -1e4, dtype=dtype)
    mask[: L // 2, : L // 2] = 0
    far = q * 0 + 12.5, k * 0 - 12.5  # 64 x 156 = 1e4
    for call in (Call(q, k, v, {"bias": mask}), Call(*far, v, {"scale": 1.0})):
        dout = normal(1, 2, L, 64, seed=4, dtype=dtype)
        got = outcome(call, Call.ours, dout, None)
        assert all(t.isfinite().all() for t in got.values())
        wrong = judge(call, dout, None, got)
        assert not wrong or dtype == torch.float32, wrong  # float32: test_attention_known.py
