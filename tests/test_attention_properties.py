"""`fusedseq.attention` beside its definition (attention_formula.py), over combinations that no list would name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_formula import INF, Call, formula, judge, outcome, seen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedseq import attention_probs, registry, use_backend

if registry.backends()["cpu"].missing() is None:
    from fusedseq import _cpu

    ROWS = (*(("cpu", isa) for isa in _cpu.isas()), ("reference", ""))
else:
    ROWS = (("reference", ""),)
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
LENGTHS = (0, 1, 2, 5, 8, 16, 17, 47, 48, 49, 63, 64, 65, 95, 97, 127, 128, 129, 192, 200)
WIDTHS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 200, 255, 256)
relaxed = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@contextmanager
def running(backend: str, isa: str, threads: int = 2) -> Iterator[None]:
    before = _cpu.isa() if isa else ""
    torch.set_num_threads(threads)
    try:
        if isa:
            _cpu.set_isa(isa)
        with use_backend(backend):
            yield
    finally:
        torch.set_num_threads(2)
        if isa:
            _cpu.set_isa(before)


class Draw:
    """What hypothesis chooses, and tensors of normal numbers that depend on a seed only."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def often(self) -> bool:
        return self.pick(True, False)

    def seldom(self) -> bool:
        return self.pick(False, False, False, True)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def chance(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def cuts(self, n: int, size: int) -> Tensor:
        """n sequences that end at or before `size`, some of them empty."""
        ends = [self.draw(st.integers(0, size)) for _ in range(n)]
        return torch.tensor([0, *sorted(ends)], dtype=self.pick(torch.int32, torch.int64))

    def broadcast(self, *full: int) -> tuple[int, ...]:
        shape = tuple(self.pick(1, size) for size in full)
        drop = self.pick(0, 0, 1, 2)  # leading dimensions of size 1 may be left out
        return shape[drop:] if all(size == 1 for size in shape[:drop]) else shape

    def view(self, t: Tensor) -> Tensor:
        """The same numbers, laid out in memory in another way."""
        how = self.pick("dense", "blhe", "columns", "steps", "transposed")
        if how == "blhe":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if how == "transposed":
            return t.transpose(2, 3).contiguous().transpose(2, 3)
        if how in ("columns", "steps"):
            step = 2 if how == "steps" else 1
            buffer = t.new_full((*t.shape[:-2], t.shape[-2] + 1, step * t.shape[-1] + 3), float("nan"))
            place = buffer[..., 1:, 1 : 1 + step * t.shape[-1] : step]
            return place.copy_(t)
        return t


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype, dropout: bool = True, packing: bool = True) -> Call:
    d = Draw(draw)
    packed = packing and d.seldom()
    B = 1 if packed else d.pick(1, 2, 3)
    Hkv, G, L, S, E = d.pick(1, 2), d.pick(1, 1, 2, 3, 5, 8), d.pick(*LENGTHS), d.pick(*LENGTHS), d.pick(*WIDTHS)
    Ev, Hq = (d.pick(*WIDTHS) if d.seldom() else E), Hkv * G
    wide = d.pick(dtype, torch.float32) if dtype in (torch.bfloat16, torch.float16) else dtype
    q = d.view(d.normal(B, Hq, L, E, dtype=dtype))
    k, v = (d.view(d.normal(B, Hkv, S, n, dtype=dtype)) for n in (E, Ev))
    if d.seldom():
        k, v = k[:1, :1].expand(B, Hkv, -1, -1), v[:1].expand(B, -1, -1, -1)
    structure: dict[str, Any] = {}
    if (causal := d.pick(None, "top-left", "bottom-right")) is not None:
        structure["causal"] = causal
    if d.often():
        structure["window"] = tuple(d.pick(None, -1, 0, 1, 3, 17, 64, 70, 10**6) for _ in range(2))
    if packed:
        n = d.pick(0, 1, 3, 5)
        pair = d.cuts(n, L), d.cuts(n, S)
        structure["cu_seqlens"] = d.cuts(n, min(L, S)) if d.often() else pair
    elif d.seldom():
        ends = [d.pick(0, 1, S // 2, max(S - 1, 0), S) for _ in range(B)]
        structure["key_lengths"] = torch.tensor([min(end, S) for end in ends], dtype=d.pick(torch.int32, torch.int64))
    if d.seldom():
        structure["global_tokens"] = d.chance(0.1, *d.pick((S,), (B, S)))
    if d.seldom():
        structure["dense"] = d.chance(0.6, *d.broadcast(B, Hq, L, S))
        if d.seldom():
            structure["dense"] = structure["dense"].expand(B, Hq, L, S)
    options: dict[str, Any] = {}
    if d.often():
        options["bias"] = d.normal(*d.broadcast(B, Hq, L, S), dtype=d.pick(dtype, torch.float32))
        if d.seldom():
            hidden = d.chance(0.2, *options["bias"].shape)
            options["bias"] = options["bias"].masked_fill(hidden, -INF)
        if d.seldom():
            options["bias"] = options["bias"].expand(B, Hq, L, S)
    if d.seldom():
        options["alibi_slopes"] = d.normal(Hq, dtype=wide).abs() / 4
    if d.seldom():
        options["sinks"] = d.normal(Hq, dtype=wide)
    if d.seldom():
        options["softcap"] = d.pick(0.7, 5.0, 50.0)
    if d.often():
        options["scale"] = d.pick(-0.4, 0.0, 0.05, 0.5, 1)
    if dropout and d.seldom():
        options |= {"dropout_p": d.pick(0.1, 0.5, 1.0), "seed": d.pick(0, 7, -3, 2**40 + 5)}
    as_dense = "dense" not in structure and d.seldom()
    return Call(q, k, v, options, structure, bias_as_dense=as_dense)


@st.composite
def upstreams(draw: st.DrawFn, call: Call) -> tuple[Tensor, Tensor | None]:
    d = Draw(draw)
    shape = (*call.q.shape[:3], call.v.shape[3])
    dout = d.view(d.normal(*shape, dtype=call.q.dtype))
    if d.seldom():
        dout = d.normal(1, 1, 1, 1, dtype=call.q.dtype).expand(shape)
    kind = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return dout, d.normal(*shape[:3], dtype=kind) if d.often() else None


def text(call: Call) -> str:
    shapes = {
        name: tuple(t.shape) if isinstance(t, Tensor) else t for name, t in {**call.leaves(), **call.options}.items()
    }
    return f"{call.q.dtype} {shapes} {call.structure}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@settings(relaxed, max_examples=50)
@given(data=st.data())
def test_any_call_equals_its_definition(dtype: torch.dtype, data: st.DataObject) -> None:
    call = data.draw(calls(dtype))
    dout, dlse = data.draw(upstreams(call))
    row = data.draw(st.sampled_from(ROWS))
    with running(*row, threads=data.draw(st.sampled_from((1, 2, 3)))):
        got = outcome(call, Call.ours, dout, dlse)
    wrong = judge(call, dout, dlse, got)
    assert not wrong, f"{row} {text(call)}\n" + "\n".join(wrong)


def alone(call: Call, b: int) -> Call:
    """Batch row b of a call."""
    B = call.q.shape[0]

    def row(t: Any) -> Any:
        table = isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == B
        return t[b : b + 1] if table else t

    structure = {name: row(t) for name, t in call.structure.items()}
    for name in ("key_lengths", "global_tokens"):
        t = structure.get(name)
        if t is not None and (name == "key_lengths" or t.dim() == 2):
            structure[name] = t[b : b + 1]
    options = {name: row(t) for name, t in call.options.items()}
    return Call(*(t[b : b + 1] for t in (call.q, call.k, call.v)), options, structure, call.bias_as_dense)


@pytest.mark.skipif(len(ROWS) == 1, reason="the compiled core is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@settings(relaxed, max_examples=40)
@given(data=st.data())
def test_bits_depend_on_neither_threads_nor_batch(dtype: torch.dtype, data: st.DataObject) -> None:
    call = data.draw(calls(dtype, dropout=False, packing=False))
    dout, dlse = data.draw(upstreams(call))
    row = data.draw(st.sampled_from(ROWS[:-1]))
    results = []
    for threads in (1, 2, 3):
        with running(*row, threads=threads):
            results.append(outcome(call, Call.ours, dout, dlse))
    for name, t in results[0].items():
        assert all(torch.equal(t, other[name]) for other in results[1:]), f"{name}: {row} {text(call)}"
    with running(*row):
        for b in range(call.q.shape[0]):
            one = outcome(alone(call, b), Call.ours, dout[b : b + 1], None if dlse is None else dlse[b : b + 1])
            for name in ("out", "lse", "dq", "dk", "dv"):
                assert torch.equal(one[name][0], results[0][name][b]), f"{name} of row {b}: {row} {text(call)}"


@pytest.mark.parametrize("row", ROWS, ids="-".join)
@settings(relaxed, max_examples=25)
@given(data=st.data())
def test_parts_of_the_keys_merge_through_lse(row: tuple[str, str], data: st.DataObject) -> None:
    """What ring attention does: parts in any number, some without a key to see, give the whole and its gradients."""
    call = data.draw(calls(torch.float64, dropout=False, packing=False))
    call.options.pop("sinks", None)
    S = call.k.shape[2]
    d = Draw(data.draw)
    structure = {"dense": seen(call).expand(call.q.shape[0], -1, -1, S)}
    options = {name: call.options[name] for name in ("scale", "softcap", "bias") if name in call.options}
    if "bias" in options:
        options["bias"] = options["bias"].expand(*call.q.shape[:3], S)
    whole = Call(call.q, call.k, call.v, options, structure)
    ends = sorted({0, S, *(d.draw(st.integers(0, S)) for _ in range(3))})

    def merged(c: Call) -> tuple[Tensor, Tensor]:
        parts = []
        for start, stop in itertools.pairwise(ends):
            some = dict(c.options)
            if "bias" in some:
                some["bias"] = some["bias"][..., start:stop]
            dense = {"dense": c.structure["dense"][..., start:stop]}
            parts.append(Call(c.q, c.k[:, :, start:stop], c.v[:, :, start:stop], some, dense).ours())
        if not parts:
            return c.ours()
        outs, lses = (torch.stack(t) for t in zip(*parts, strict=True))
        none = (lses == -INF).all(0)
        total = torch.where(none, -INF, lses.masked_fill(none, 0.0).logsumexp(0))
        weights = (lses - total.masked_fill(none, 0.0)).exp()
        return (outs * weights.unsqueeze(-1)).sum(0), total

    dout, dlse = data.draw(upstreams(whole))
    with running(*row):
        got = outcome(whole, merged, dout, dlse)
    wrong = judge(whole, dout, dlse, got)
    assert not wrong, f"{ends} {text(whole)}\n" + "\n".join(wrong)


@pytest.mark.parametrize("row", ROWS, ids="-".join)
@settings(relaxed, max_examples=25)
@given(data=st.data())
def test_probabilities_are_those_of_the_definition(row: tuple[str, str], data: st.DataObject) -> None:
    call = data.draw(calls(torch.float64, dropout=False))
    arguments = {name: t for name, t in call.arguments().items() if name != "sinks"}
    S = call.k.shape[2]
    with running(*row):
        _, lse = call.ours()
        P = attention_probs(call.q, call.k, lse, **arguments)
    eye = torch.eye(S, dtype=torch.float64).expand(*call.k.shape[:3], S)
    expected, _ = formula(call.replaced(v=eye), torch.float64)
    torch.testing.assert_close(P, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row", ROWS, ids="-".join)
@settings(relaxed, max_examples=40)
@given(data=st.data())
def test_what_is_not_finite_goes_where_it_is_seen(row: tuple[str, str], data: st.DataObject) -> None:
    """One NaN or infinity: rows that see it become what the definition says, other rows of q are untouched."""
    d = Draw(data.draw)
    dtype = d.pick(torch.float32, torch.bfloat16)
    L, S, E = d.pick(1, 3, 17, 65), d.pick(1, 5, 64, 130), d.pick(1, 8, 33)
    q, k, v = (d.normal(1, 2, n, E, dtype=dtype) for n in (L, S, S))
    structure = d.pick({}, {"causal": "top-left"}, {"window": (2, 3)}, {"dense": d.chance(0.7, L, S)})
    call = Call(q, k, v, {}, structure)
    name, value = d.pick("q", "k", "v"), d.pick(float("nan"), INF, -INF)
    spoiled = getattr(call, name).clone()
    at = d.draw(st.integers(0, spoiled.shape[2] - 1))
    spoiled[0, 1, at, d.draw(st.integers(0, E - 1))] = value
    call, clean = call.replaced(**{name: spoiled}), call
    with running(*row):
        out, before = call.ours()[0], clean.ours()[0]
    expected = formula(call, torch.float64)[0]
    hit = torch.arange(L) == at if name == "q" else seen(call)[0, 0, :, at]
    assert torch.equal(out[0, 0], before[0, 0]), "the other head"
    for rule in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(rule(out[0, 1, hit]), rule(expected[0, 1, hit])), f"{name} {value} {row} {text(call)}"
    if name == "q":
        assert torch.equal(out[0, 1, ~hit], before[0, 1, ~hit])


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_every_width_of_a_head(row: tuple[str, str]) -> None:
    """Up to 256 and a little more; L and S leave a tail in every tile."""
    for E in (*range(1, 67), *range(69, 256, 9), 255, 256, 257, 300):
        dtype = list(DTYPES.values())[E % 3 if E % 3 else 3 * (E % 2)]
        gen = torch.Generator().manual_seed(E)
        tensors = (torch.randn(s, generator=gen, dtype=torch.float64).to(dtype)
                   for s in ((1, 2, 7, E), (1, 1, 19, E), (1, 1, 19, E), (1, 2, 7, E)))  # fmt: skip
        q, k, v, dout = tensors
        call = Call(q, k, v, {}, {"causal": "bottom-right"})
        with running(*row, threads=1):
            got = outcome(call, Call.ours, dout, None)
        wrong = judge(call, dout, None, got)
        assert not wrong, f"E = {E} {dtype}: {wrong}"


@pytest.mark.parametrize("causal", [None, "top-left", "bottom-right"])
@pytest.mark.parametrize("window", [(0, 0), (3, None), (None, 5), (66, 1)], ids=str)
def test_every_structure(causal: Any, window: Any) -> None:
    """Sizes at which each bound matters, beside global tokens, lengths and dropout."""
    gen = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(2, 2, n, 8, generator=gen, dtype=torch.float64) for n in (70, 97, 97, 70))
    structure = {"window": window, "key_lengths": torch.tensor([97, 40])}
    if causal is not None:
        structure["causal"] = causal
    for more in ({}, {"global_tokens": torch.rand(2, 97, generator=gen) < 0.1}):
        call = Call(q, k, v, {"dropout_p": 0.3, "seed": 5}, {**structure, **more})
        for row in ROWS:
            with running(*row):
                got = outcome(call, Call.ours, dout, None)
            assert not judge(call, dout, None, got), f"{row} {text(call)}"
