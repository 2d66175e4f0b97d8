"""The Hopper backward kernels against the float64 truth, run by the emulator, and what they owe beyond being right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import cuda_emulated
import pytest
import torch
from test_cuda_hopper import Spy, watched
from torch import Tensor

import fusedseq
from fusedseq import config
from fusedseq.backends import cuda_attention
from fusedseq.ops.attention import run as attention
from fusedseq.reference.attention import Problem
from fusedseq.testing.attention_cases import AttentionCase, make_attention
from fusedseq.testing.attention_compare import compare_with, evaluate_attention, judge_attention
from fusedseq.testing.cases import short

# Tiles of 128 keys, and of 192 or (E = 128) 128 queries, are owned and tiles of 64 go past: one, several, ends within
# them; every structure that the kernels take.
TAKEN = """
B1H1L1S1E64
B1H1L192S128E64
B1H1L128S128E128
B2H1L65S300E64-lse
B1H2L130S257E128-lse
B1H2L300S260E64-causal-lse
B1H1L260S260E128-causal
B1H2L100S270E64-br-lse
B1H1L270S100E64-br
B1H1L200S420E128-br-left100-lse
B1H2L300S300E64-left70-right40
B1H1L300S300E64-left10-right0
B4H1L140S300E64-lengths-lse
B3H1L40S200E128-lengths-causal
B3H4K2L140S150E64-lengths-br-sinks-blhe-lse
B1H6K2L150S140E64-causal-blhe
B1H3K1L70S130E128-lse
B1H2L64S130E64-x50
B2H2L300S300E64-right20-sinks
"""
FORWARD, BACKWARD = "attention_hopper", "attention_backward_hopper"
NAMES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


def compare(case: AttentionCase, dtype: torch.dtype, seed: int, numbers: int = 0, **device: int) -> None:
    x = make_attention(case, dtype, seed=numbers)
    base = compare_with(x)
    with cuda_emulated.device(seed, **device):
        wrong = [str(error) for error in judge_attention(evaluate_attention(attention, x), base) if not error.ok]
    assert not wrong, "\n".join(wrong)


def gradients(p: Problem, dout: Tensor | None, dlse: Tensor | None, needs: tuple[bool, ...] = (True,) * 6) -> Any:
    out, lse = cuda_attention.attention_forward(p)
    return cuda_attention.attention_backward(p, out, lse, dout, dlse, needs)


@pytest.fixture(autouse=True)
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    with watched(monkeypatch) as core:
        yield core


CASES = [
    pytest.param(AttentionCase(text), dtype, id=f"{text}-{short(dtype)}")
    for dtype, every in ((torch.bfloat16, 1), (torch.float16, 4))
    for text in TAKEN.split()[::every]
]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_parity(case: AttentionCase, dtype: torch.dtype, spy: Spy) -> None:
    compare(case, dtype, seed=1)
    assert spy.ran == [FORWARD, BACKWARD]


@pytest.mark.parametrize("seed", range(2, 5))
@pytest.mark.parametrize("text", ["B1H4K2L300S290E64-br-left200-lse", "B3H1L200S300E128-lengths", "B1H2L330S130E64"])
def test_many_tiles_a_cta_under_several_schedules(text: str, seed: int, spy: Spy) -> None:
    compare(AttentionCase(text), torch.bfloat16, seed, numbers=seed, sms=1 + seed % 2)
    assert spy.ran == [FORWARD, BACKWARD]


@pytest.mark.parametrize("text", ["B2H4K2L140S200E64-causal-lse", "B2H1L130S200E128-lengths-left90-lse"])
def test_any_order_of_threads_gives_the_same_bits(text: str, spy: Spy) -> None:
    x = make_attention(AttentionCase(text), torch.bfloat16)
    with cuda_emulated.device(0):
        first = gradients(x.problem, x.dout, x.dlse)
    for seed in (5, 6):
        with cuda_emulated.device(seed, sms=seed - 4):
            again = gradients(x.problem, x.dout, x.dlse)
        for name, a, b in zip(NAMES[:3], first, again, strict=False):
            assert torch.equal(a, b), f"d{name} depends on the order in which threads run (seed {seed})"
    assert set(spy.ran) == {FORWARD, BACKWARD}


def test_a_row_does_not_depend_on_its_batch(spy: Spy) -> None:
    x = make_attention(AttentionCase("B2H2L150S260E64-br-left90-lse"), torch.float16)
    p = x.problem
    assert x.dlse is not None
    with cuda_emulated.device(3, sms=3):
        whole = gradients(p, x.dout, x.dlse)
        part = gradients(p._replace(q=p.q[1:], k=p.k[1:], v=p.v[1:]), x.dout[1:], x.dlse[1:])
    assert all(torch.equal(a[1:], b) for a, b in zip(whole[:3], part[:3], strict=True))
    assert set(spy.ran) == {FORWARD, BACKWARD}


@pytest.mark.parametrize("text", ["B3H1L40S200E128-lengths-causal", "B3H1L140S300E64-lengths-right60"])
def test_nothing_behind_a_length_matters(text: str, spy: Spy) -> None:
    x = make_attention(AttentionCase(text), torch.bfloat16)
    p = x.problem
    assert p.key_lengths is not None
    behind = (torch.arange(p.k.shape[2]) >= p.key_lengths[:, None])[:, None, :, None]
    spoiled = [t.masked_fill(behind, float("nan")) for t in (p.k, p.v)]
    with cuda_emulated.device(7):
        wanted = gradients(p, x.dout, None)
        found = gradients(p._replace(k=spoiled[0], v=spoiled[1]), x.dout, None)
    for name, a, b in zip(NAMES[:3], wanted, found, strict=False):
        assert torch.equal(a, b), name
    for name, t in zip(("k", "v"), wanted[1:3], strict=True):
        assert not t.masked_select(behind).any(), f"d{name} of keys behind a length"
    assert set(spy.ran) == {FORWARD, BACKWARD}


def test_what_is_not_wanted_is_not_made(spy: Spy) -> None:
    x = make_attention(AttentionCase("B1H4K2L70S90E64-causal-sinks-lse"), torch.bfloat16)
    with cuda_emulated.device():
        whole = gradients(x.problem, x.dout, x.dlse)
        for i in (0, 1, 2, 5):
            needs = tuple(n == i for n in range(6))
            some = gradients(x.problem, x.dout, x.dlse, needs)
            assert [g is not None for g in some] == list(needs)
            assert torch.equal(some[i], whole[i]), f"d{NAMES[i]} alone"
    assert set(spy.ran) == {FORWARD, BACKWARD}


REFUSED = [
    ("B1H2L70S70E32", "heads of 64 or 128 elements"),
    ("B1H2L70S70E64-bias", "no bias"),
    ("B1H2L90S90E64-packed", "no packed sequences"),
]


@pytest.mark.parametrize(("text", "reason"), [pytest.param(*row, id=row[0]) for row in REFUSED])
def test_what_it_refuses_runs_on_the_other_kernels(text: str, reason: str, spy: Spy) -> None:
    compare(AttentionCase(text), torch.bfloat16, seed=1)
    assert spy.ran == ["attention_forward", "attention_backward"]
    assert all(reason in one for one in spy.reasons)


def test_an_expanded_upstream_gradient_goes_to_the_other_kernels(spy: Spy) -> None:
    x = make_attention(AttentionCase("B1H2L70S70E64"), torch.bfloat16)
    dout = x.dout[:, :1].expand_as(x.dout)
    with cuda_emulated.device():
        found = gradients(x.problem, dout, None)
        wanted = gradients(x.problem, dout.contiguous(), None)
    assert spy.ran == [FORWARD, "attention_backward", FORWARD, BACKWARD]
    assert "dout has rows at multiples of 16 bytes and is not expanded" in spy.reasons
    for a, b in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", ["attention_hopper", "attention_hopper_queries", "attention_hopper_keys"])
def test_a_producer_that_falls_silent_is_an_error(kernel: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied; the consumers do not wait for ever but end the launch, and say so in the word of faults."""
    x = make_attention(AttentionCase("B1H1L70S70E64"), torch.bfloat16)
    needs = (kernel.endswith("queries"), *(kernel.endswith("keys"),) * 2, False, False, False)
    with cuda_emulated.device():
        out, lse = cuda_attention.attention_forward(x.problem)
    named = cuda_attention.Call.named
    monkeypatch.setattr(cuda_attention.Call, "named", lambda call, stream: named(call, stream) | {"stuck": 1})
    with cuda_emulated.device(), pytest.raises(RuntimeError, match=rf"{kernel} \(bfloat16 B=1 .*abandon"):
        if kernel == FORWARD:
            cuda_attention.attention_forward(x.problem)
        else:
            cuda_attention.attention_backward(x.problem, out, lse, x.dout, None, needs)
    with pytest.raises(cuda_attention.cuda_scan.Fault, match="FUSEDSEQ_CUDA_ATTENTION=mma"):
        cuda_attention.cuda_scan.check_fault(torch.device("cpu"))
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("text", "kind", "names", "reason"),
    [
        ("B1H1L9S9E64", "hopper", ("hopper", "hopper"), ""),
        ("B1H1L9S9E32", "hopper", ("mma", "mma"), "not hopper: it is for heads of 64 or 128 elements"),
        ("B1H1L9S9E64", None, ("hopper", "hopper"), ""),
        ("B1H1L9S9E32", None, ("mma", "mma"), "not hopper: it is for heads of 64 or 128 elements"),
        ("B1H1L9S9E64", "mma", ("mma", "mma"), ""),
        ("B1H1L1S600E64", "mma", ("decode", "mma"), ""),
    ],
)
def test_the_record_names_the_kernels(
    text: str, kind: str | None, names: tuple[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_attention=kind))
    x = make_attention(AttentionCase(text), torch.bfloat16)

    def train() -> None:
        q = x.problem.q.detach().requires_grad_()
        attention(x.problem._replace(q=q))[0].backward(x.dout)

    with cuda_emulated.device():
        report = fusedseq.explain(train)
    assert [(k.op, k.direction, k.backend) for k in report.kernels] == [
        ("attention", "forward", "cuda"),
        ("attention", "backward", "cuda"),
    ]
    assert tuple(k.name for k in report.kernels) == names
    assert all(k.reason.startswith(reason) and bool(k.reason) == bool(reason) for k in report.kernels)
    assert f"attention backward: {names[1]} of cuda" in str(report)


def test_a_direct_call_of_what_it_refuses_raises() -> None:
    x = make_attention(AttentionCase("B1H1L9S9E32"), torch.bfloat16)
    call, lse = cuda_attention.Call(x.problem), torch.empty(1, 1, 9)
    dq, dk, dv = (cuda_attention._heads(torch.empty_like(t)) for t in x.problem[:3])
    arguments = (call.sizes, call.tensors(x.dout, lse), call.numbers(), call.named(None))
    with cuda_emulated.device(), pytest.raises(RuntimeError, match="do not take this call: it is for heads of 64"):
        cuda_emulated.module().attention_backward_hopper(
            *arguments, (cuda_attention._heads(x.dout), None, dq, dk, dv, None, None, None)
        )
