"""Attention beyond single numbers: masks that mean the same said in two ways, rows without keys, infinities,
determinism, dropout, parts that merge, and torch's own function as the judge of the drop-in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedseq
from fusedseq import Mask, attention, attention_probs, scaled_dot_product_attention, use_backend
from fusedseq.ops import ArgumentTypeError, ArgumentValueError
from fusedseq.ops.attention import run
from fusedseq.reference import attention as specification
from fusedseq.testing import cpu_backends
from fusedseq.testing.attention_cases import COMPACT, FULL, AttentionCase, make_attention
from fusedseq.testing.attention_compare import compare_with, evaluate_attention, judge_attention

USABLE = cpu_backends()
CASES = [AttentionCase(text) for text in (COMPACT + FULL).split()]
INF = float("inf")


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> Any:
    with use_backend(request.param):
        yield request.param


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)


def qkv(B: int = 2, H: int = 2, L: int = 9, S: int = 9, E: int = 16, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(normal(B, H, n, E, seed=i, **options).requires_grad_() for i, n in enumerate((L, S, S)))  # type: ignore[return-value]


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, normal(*out.shape, seed=7).to(out.dtype))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    for name, t in a.items():
        assert torch.equal(t, b[name]) or (t.isnan() & b[name].isnan() | (t == b[name])).all(), f"{what}: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bitwise_whatever_the_threads(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = make_attention(case, dtype)
    if "cpu" not in USABLE:
        pytest.skip("the compiled core is not there")
    outcomes = []
    try:
        with use_backend("cpu"):
            for threads in (2, 1, 3, 2, 7):
                torch.set_num_threads(threads)
                outcomes.append(evaluate_attention(run, inputs))
    finally:
        torch.set_num_threads(2)
    for one in outcomes[1:]:
        assert_same(outcomes[0], one, case.text)


@pytest.mark.parametrize("text", ["B4H4K2L100S130E32-causal-alibi-lse", "B3H8K1L1S700E64-sinks-lse", "B5H2L20S300E16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_row_does_not_depend_on_its_batch(text: str, dtype: torch.dtype) -> None:
    if "cpu" not in USABLE:
        pytest.skip("the compiled core is not there")
    inputs = make_attention(AttentionCase(text), dtype)
    p = inputs.problem
    with use_backend("cpu"):
        together = evaluate_attention(run, inputs)
        for b in range(p.q.shape[0]):
            one = inputs.to(dtype)
            one.problem = p._replace(q=p.q[b : b + 1], k=p.k[b : b + 1], v=p.v[b : b + 1])
            one.dout, one.dlse = inputs.dout[b : b + 1], None if inputs.dlse is None else inputs.dlse[b : b + 1]
            alone = evaluate_attention(run, one)
            for name in ("out", "lse", "dq", "dk", "dv"):
                assert torch.equal(alone[name][0], together[name][b]), name


def test_packed_sequences_equal_each_alone(backend: str) -> None:
    q, k, v = qkv(B=1, L=70, S=90)
    cu_q, cu_k = torch.tensor([0, 20, 20, 65]), torch.tensor([0, 31, 50, 50])
    out, lse = attention(q, k, v, mask=Mask("bottom-right", cu_seqlens=(cu_q, cu_k)), return_lse=True)
    for n in range(3):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask=Mask("bottom-right"))
        torch.testing.assert_close(out[:, :, rows], alone, rtol=1e-6, atol=1e-6)
    assert not out[:, :, 65:].any() and (lse[:, :, 65:] == -INF).all()


def test_structure_equals_its_table(backend: str) -> None:
    q, k, v = qkv(L=40, S=55)
    i, j = torch.arange(40)[:, None], torch.arange(55)
    lengths = torch.tensor([55, 30])[:, None, None, None]
    for mask, table in (
        (Mask("top-left"), j <= i),
        (Mask("bottom-right"), j <= i + 15),
        (Mask(window=(3, 5)), (j >= i - 3) & (j <= i + 5)),
        (Mask("top-left", (7, None)), (j >= i - 7) & (j <= i)),
        (Mask(key_lengths=lengths.flatten().int()), j < lengths),
        (Mask("bottom-right", (9, -1), key_lengths=lengths.flatten()),
         (j < lengths) & (j <= i + lengths - 40) & (j >= i + lengths - 49)),
        (Mask(window=(2, 2), global_tokens=j % 20 == 0), ((j >= i - 2) & (j <= i + 2)) | (j % 20 == 0)),
    ):  # fmt: skip
        a, b = attention(q, k, v, mask=mask), attention(q, k, v, mask=Mask(dense=table))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for x, y in zip(gradients(a, q, k, v), gradients(b, q, k, v), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_without_a_key(backend: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(L=70, S=70, dtype=dtype)
    for mask in (
        Mask(key_lengths=torch.tensor([0, 3])),
        Mask("bottom-right", key_lengths=torch.tensor([0, 5])),
        Mask(dense=torch.zeros(70, 70, dtype=torch.bool)),
        Mask(dense=torch.full((70, 70), -INF, dtype=dtype)),
    ):
        out, lse = attention(q, k, v, mask=mask, return_lse=True)
        empty = lse == -INF
        assert empty[0].all() and not out[empty].any() and out.isfinite().all()
        for upstream in (torch.ones_like(out), None):
            heads = [out, lse] if upstream is None else [out]
            grads = [torch.ones_like(t) for t in heads]
            for g in torch.autograd.grad(heads, (q, k, v), grads, retain_graph=True):
                assert g.isfinite().all() and not g[0].any()
    sinks = torch.tensor([1.5, -2.0])
    out, lse = attention(q, k, v, mask=Mask(key_lengths=torch.tensor([0, 3])), sinks=sinks, return_lse=True)
    assert not out[0].any()
    torch.testing.assert_close(lse[0, :, 0].float(), sinks)


def test_large_logits_and_what_is_not_finite(backend: str) -> None:
    q, k, v = qkv(L=64, S=128)
    bias = torch.full((64, 128), -1e4)
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    torch.testing.assert_close(out, attention(q, k, v), rtol=0, atol=5e-3)  # 1e4 leaves a logit three digits
    assert lse.isfinite().all() and all(g.isfinite().all() for g in gradients(out, q, k, v))
    for where, value in ((q, float("nan")), (k, float("nan")), (v, float("nan")), (q, INF), (k, -INF), (v, INF)):
        spoiled = [t.detach().clone() for t in (q, k, v)]
        spoiled[[q, k, v].index(where) if where is q else 1 if where is k else 2][0, 1, 5, 3] = value
        ours, theirs = scaled_dot_product_attention(*spoiled), F.scaled_dot_product_attention(*spoiled)
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    padded = [t.detach().clone() for t in (q, k, v)]
    for t in padded[1:]:
        t[:, :, 77:] = float("nan")
    assert attention(*padded, mask=Mask(key_lengths=torch.tensor([77, 77]))).isfinite().all()


def test_parts_of_the_keys_merge(backend: str) -> None:
    q, k, v = qkv(L=21, S=90, dtype=torch.float64)
    whole, lse = attention(q, k, v, return_lse=True)
    outs, lses = zip(
        *(attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 37), slice(37, 90))), strict=True
    )
    total = torch.logsumexp(torch.stack(lses), 0)
    merged = sum(o * (part - total).exp().unsqueeze(-1) for o, part in zip(outs, lses, strict=True))
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(total, lse)
    for a, b in zip(gradients(merged, q, k, v), gradients(whole, q, k, v), strict=True):
        torch.testing.assert_close(a, b)


def test_probabilities(backend: str) -> None:
    q, k, v = qkv(H=4, L=12, S=15)
    mask, slopes = Mask("bottom-right", (6, None)), torch.rand(4)
    out, lse = attention(q, k, v, mask=mask, alibi_slopes=slopes, softcap=3.0, return_lse=True)
    P = attention_probs(q, k, lse, mask=mask, alibi_slopes=slopes, softcap=3.0)
    torch.testing.assert_close(P @ v, out, rtol=1e-5, atol=1e-6)
    some = attention_probs(q, k, lse, heads=[3, 1], rows=torch.tensor([0, -1]), mask=mask, alibi_slopes=slopes, softcap=3.0)  # fmt: skip  # noqa: E501
    assert some.shape == (2, 2, 2, 15)
    torch.testing.assert_close(some, P[:, [3, 1]][:, :, [0, -1]])
    with pytest.raises(ArgumentValueError, match=r"rows: expected indices below 12, got \[12\]"):
        attention_probs(q, k, lse, rows=[12])


def test_philox_known_answers() -> None:
    zero, ones = torch.zeros((), dtype=torch.int64), torch.full((), 0xFFFFFFFF)
    words = specification.philox((zero,) * 4, (0, 0))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = specification.philox((ones,) * 4, (0xFFFFFFFF, 0xFFFFFFFF))
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_drops_the_same_everywhere(backend: str, p: float) -> None:
    """With v the identity, the output is the dropped probabilities themselves."""
    q, k, _ = qkv(H=3, L=33, S=150)
    v = torch.eye(150).expand(2, 3, 150, 150)
    out = attention(q, k, v, dropout_p=p, seed=-5)
    problem = specification.Problem(q, k, v, seed=torch.tensor(-5), dropout_p=p)
    scale = specification.dropout_scale(problem)
    assert torch.equal(out != 0, scale != 0)
    if p < 1:
        kept = (scale != 0).double().mean().item()
        assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / scale.numel()) ** 0.5
        torch.testing.assert_close(out, attention(q, k, v) * scale, rtol=1e-4, atol=1e-6)


def test_seeds_come_from_the_generator(backend: str) -> None:
    q, k, v = (t.detach() for t in qkv())
    torch.manual_seed(3)
    a, b = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(a, attention(q, k, v, dropout_p=0.5)) and not torch.equal(a, b)
    seed = torch.tensor(11)
    assert torch.equal(attention(q, k, v, dropout_p=0.5, seed=11), attention(q, k, v, dropout_p=0.5, seed=seed))


SDPA: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, dict[str, Any]]] = [
    ((2, 3, 5, 8), (2, 3, 7, 8), None, {}),
    ((2, 3, 5, 8), (2, 3, 7, 8), None, {"is_causal": True}),
    ((2, 3, 7, 8), (2, 3, 5, 8), None, {"is_causal": True, "scale": -0.7}),
    ((5, 8), (7, 8), None, {"scale": 0.3}),
    ((3, 5, 8), (3, 7, 8), (5, 7), {}),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 1, 7), {}),
    ((2, 3, 5, 8), (2, 3, 7, 8), (3, 5, 7), {}),
    ((4, 2, 3, 5, 8), (4, 2, 3, 7, 8), (2, 1, 5, 7), {}),
    ((4, 2, 3, 5, 8), (4, 2, 3, 7, 8), (5, 7), {}),
    ((2, 6, 5, 8), (2, 2, 7, 8), (5, 7), {"enable_gqa": True}),
    ((2, 3, 5, 8), (1, 3, 7, 8), None, {}),
    ((2, 3, 5, 8), (2, 1, 7, 8), (1, 7), {}),
    ((2, 3, 0, 8), (2, 3, 7, 8), None, {}),
    ((2, 3, 5, 8), (2, 3, 0, 8), None, {}),
    ((0, 3, 5, 8), (0, 3, 7, 8), None, {}),
    ((2, 3, 5, 8), (2, 3, 7, 8), None, {"scale": 0.0}),
]


@pytest.mark.parametrize(("q_shape", "k_shape", "mask_shape", "options"), SDPA)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_sdpa_equals_torch(backend: str, q_shape: Any, k_shape: Any, mask_shape: Any, options: Any, kind: str) -> None:
    q, k, v = normal(*q_shape), normal(*k_shape, seed=1), normal(*k_shape[:-1], 6, seed=2)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    if mask_shape is not None and kind == "bool":
        options = {**options, "attn_mask": normal(*mask_shape, seed=3) > -0.5}
    elif mask_shape is not None:
        bias = normal(*mask_shape, seed=3).requires_grad_()
        options, tensors = {**options, "attn_mask": bias}, [*tensors, bias]
    ours, theirs = scaled_dot_product_attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if ours.numel() and k.numel():
        for a, b in zip(gradients(ours, *tensors), gradients(theirs, *tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sdpa_takes_causal_bias(backend: str) -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = qkv(L=5, S=9)
    for make in (causal_lower_right, causal_upper_left):
        ours = scaled_dot_product_attention(q, k, v, attn_mask=make(5, 9))
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=make(5, 9)))


def test_sdpa_refuses_as_torch_does() -> None:
    q = normal(2, 4, 5, 8)
    for args, options in (
        ((q, normal(2, 2, 5, 8), normal(2, 2, 5, 8)), {}),
        ((q, normal(2, 3, 5, 8), normal(2, 3, 5, 8)), {"enable_gqa": True}),
        ((q, q, q), {"attn_mask": torch.ones(5, 5, dtype=torch.int32)}),
        ((q, q, q), {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}),
        ((q, q, q), {"attn_mask": torch.zeros(5, 6)}),
        ((q, q, q.double()), {}),
        ((q[0, 0, 0], q[0, 0, 0], q[0, 0, 0]), {}),
        ((q, q[..., :3], q), {}),
        ((q, q, q), {"dropout_p": 1.5}),
        ((q.int(), q.int(), q.int()), {}),
        (("q", q, q), {}),
    ):
        errors = []
        for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
            with pytest.raises((RuntimeError, TypeError)) as caught:
                function(*args, **options)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]
    with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set when is_causal=True"):
        scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5, dtype=torch.bool), is_causal=True)


def test_errors_name_the_argument() -> None:
    q, k, v = (t.detach() for t in qkv(L=5, S=7))
    value: list[tuple[dict[str, Any], str]] = [
        ({"q": q[0]}, r"q: expected 4 dimensions \[B, Hq, L, E\], got \[2, 5, 16\]"),
        ({"k": k[:1]}, r"k: expected shape \[2, Hkv, S, 16\], with B and E of q, got \[1, 2, 7, 16\]"),
        ({"k": normal(2, 3, 7, 16)}, "k: expected a number of heads that divides the 2 of q, got 3"),
        ({"v": v[:, :, :5]}, "v: expected shape"),
        ({"bias": normal(3, 5, 7)}, r"bias: expected a shape that broadcasts to \[2, 2, 5, 7\], got \[1, 3, 5, 7\]"),
        ({"sinks": normal(3)}, r"sinks: expected shape \[2\]"),
        ({"alibi_slopes": normal(2, 1)}, r"alibi_slopes: expected shape \[2\]"),
        ({"dropout_p": 1.5}, "dropout_p: expected a probability between 0 and 1, got 1.5"),
        ({"softcap": 0.0}, "softcap: expected a positive number or None, got 0.0"),
        ({"mask": Mask(key_lengths=torch.tensor([8, 1]))}, "key_lengths: expected entries of at most S = 7, got 8"),
        ({"mask": Mask(key_lengths=torch.tensor([-1, 1]))}, "key_lengths: expected no negative entry, got -1"),
        ({"mask": Mask(key_lengths=torch.tensor([1]))}, r"key_lengths: expected shape \[2\], got \[1\]"),
        ({"mask": Mask(cu_seqlens=torch.tensor([0, 5]))}, "cu_seqlens: expected one batch row"),
        ({"mask": Mask(global_tokens=torch.ones(5, dtype=torch.bool))}, r"global_tokens: expected shape \[7\]"),
        ({"mask": Mask(dense=torch.ones(5, 6, dtype=torch.bool))}, "dense: expected a shape that broadcasts"),
    ]
    types: list[tuple[dict[str, Any], str]] = [
        ({"k": k.double()}, "k: expected dtype torch.float32, that of q, got torch.float64"),
        ({"q": q.int()}, "q: expected dtype float32, float64, bfloat16 or float16, got torch.int32"),
        ({"v": 3}, "v: expected a tensor, got int"),
        ({"mask": torch.ones(5, 7)}, "mask: expected a fusedseq.Mask or None, got Tensor"),
        ({"bias": normal(5, 7).double()}, "bias: expected dtype torch.float32"),
        ({"sinks": torch.ones(2, dtype=torch.int64)}, "sinks: expected a floating dtype"),
        ({"mask": Mask(key_lengths=torch.ones(2))}, "key_lengths: expected dtype torch.int64"),
    ]
    for error, rows in ((ArgumentValueError, value), (ArgumentTypeError, types)):
        for change, text in rows:
            given = {"q": q, "k": k, "v": v, **change}
            with pytest.raises(error, match=text):
                attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    for bad in ({"causal": "left"}, {"window": 3}, {"window": (-2, 0)}):
        with pytest.raises(ArgumentValueError, match=next(iter(bad))):
            Mask(**bad)  # type: ignore[arg-type]
    both = {"key_lengths": torch.tensor([1]), "cu_seqlens": torch.tensor([0, 1])}
    with pytest.raises(ArgumentValueError, match="key_lengths"):
        Mask(**both)  # type: ignore[arg-type]
    one = (t[:1] for t in (q, k, v))
    with pytest.raises(ArgumentValueError, match="cu_seqlens: expected a last entry of at most L = 5, got 6"):
        attention(*one, mask=Mask(cu_seqlens=torch.tensor([0, 6])))


def test_explain_and_the_layout_of_the_output() -> None:
    q, k, v = (normal(2, 6, 3, 8, seed=i).transpose(1, 2) for i in range(3))
    report = fusedseq.explain(attention, q, k, v, mask=Mask("top-left"))
    assert report.output.transpose(1, 2).is_contiguous()
    assert "attention cpu float32 B=2 Hq=3 Hkv=3 L=6 S=6 E=8 Ev=8 causal ->" in repr(report)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_combination(data: st.DataObject) -> None:
    def pick(*options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    sizes = [pick(1, 2, 3), pick(1, 2), pick(1, 2, 3), pick(1, 3, 17, 70), pick(1, 2, 31, 65, 140), pick(1, 7, 16, 48)]
    words = [word for word in ("lse", "dropout", "softcap", "sinks", "alibi", pick("bias", "biasH", "biasS", "biasL"))
             if pick(True, False)]  # fmt: skip
    words += [word for word in (pick("causal", "br", ""), pick("lengths", "global", ""), pick("dense", "denseL1", "")) if word]  # fmt: skip  # noqa: E501
    words += [f"left{pick(0, 3, 66)}"] if pick(True, False) else []
    B, K, G, L, S, E = sizes
    case = AttentionCase("-".join([f"B{B}H{K * G}K{K}L{L}S{S}E{E}V{pick(E, 5)}", *words, pick("blhe", "expanded")]))
    dtype = pick(torch.float32, torch.float64, torch.bfloat16, torch.float16)
    base = compare_with(make_attention(case, dtype))
    for name in USABLE:
        with use_backend(name):
            errors = judge_attention(evaluate_attention(run, base.inputs), base)
        assert all(e.ok for e in errors), (name, case.text, dtype, [str(e) for e in errors if not e.ok])
