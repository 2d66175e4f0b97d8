"""The Hopper forward kernel against the float64 truth, run by the emulator, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import cuda_emulated
import pytest
import torch

import fusedseq
from fusedseq import config, registry
from fusedseq.backends import cuda, cuda_attention
from fusedseq.ops.attention import run as attention
from fusedseq.testing.attention_cases import AttentionCase, make_attention
from fusedseq.testing.attention_compare import attention_baseline, judge_attention
from fusedseq.testing.cases import short

# Tiles of 192 or (E = 128) 128 queries, and 128 keys: one, several, ends within them; every structure that the kernel
# takes.
TAKEN = """
B1H1L1S1E64
B1H1L192S128E64
B1H1L128S128E128
B2H1L65S300E64-lse
B1H2L130S257E128-lse
B1H2L300S300E64-causal-lse
B1H1L260S260E128-causal
B1H2L100S270E64-br-lse
B1H1L270S100E64-br
B1H1L200S520E128-br-left100-lse
B1H2L300S300E64-left70-right40
B1H1L400S400E64-left10-right0
B4H1L140S400E64-lengths-lse
B3H1L40S200E128-lengths-causal
B3H4K2L140S150E64-lengths-br-sinks-blhe
B1H6K2L150S140E64-causal-blhe
B1H2L64S130E64-x50
B2H2L300S300E64-right20-sinks
"""


class Spy:
    """`fusedseq._cuda` or its like; `ran`: the kernels launched, `reasons`: why the Hopper kernel was not."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.ran: list[str] = []
        self.reasons: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.core, name)
        if name in ("attention_hopper_refuses", "attention_backward_hopper_refuses"):
            return lambda *arguments: self.reasons.append(function(*arguments)) or self.reasons[-1]
        if name in ("attention_hopper", "attention_forward", "attention_backward", "attention_backward_hopper"):
            self.ran.append(name)
        return function


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    """The emulated backend with the Hopper kernels switched on."""
    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_attention="hopper"))
    core = Spy(cuda_emulated.module())
    with cuda.emulated(core), fusedseq.use_backend("cuda"):
        yield core


@pytest.fixture(autouse=True)
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    with watched(monkeypatch) as core:
        yield core


def compare(case: AttentionCase, dtype: torch.dtype, seed: int, **device: int) -> None:
    base = attention_baseline(case, dtype)
    with cuda_emulated.device(seed, **device), registry.record() as choices:
        out, lse = attention(base.inputs.problem)
    assert {choice.backend for choice in choices} == {"cuda"}
    found = {"out": out, "lse": lse}
    truth = dataclasses.replace(base, truth={name: base.truth[name] for name in found})
    wrong = [str(error) for error in judge_attention(found, truth) if not error.ok]
    assert not wrong, "\n".join(wrong)


# Between the types only conversions and the instruction's name differ: every fourth case suffices for the second.
CASES = [
    pytest.param(AttentionCase(text), dtype, id=f"{text}-{short(dtype)}")
    for dtype, every in ((torch.bfloat16, 1), (torch.float16, 4))
    for text in TAKEN.split()[::every]
]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_parity(case: AttentionCase, dtype: torch.dtype, spy: Spy) -> None:
    compare(case, dtype, seed=1)
    assert spy.ran == ["attention_hopper"]


@pytest.mark.parametrize("seed", range(2, 5))
@pytest.mark.parametrize("text", ["B1H3L300S390E64-br-left200", "B3H1L200S300E128-lengths", "B1H1L130S640E64"])
def test_many_tiles_a_cta_under_several_schedules(text: str, seed: int, spy: Spy) -> None:
    compare(AttentionCase(text), torch.bfloat16, seed, sms=1 + seed % 2)
    assert spy.ran == ["attention_hopper"]


@pytest.mark.parametrize("text", ["B3H1L40S200E128-lengths-causal", "B3H1L140S300E64-lengths-right60"])
def test_nothing_behind_a_length_matters(text: str, spy: Spy) -> None:
    problem = make_attention(AttentionCase(text), torch.bfloat16).problem
    assert problem.key_lengths is not None
    behind = torch.arange(problem.k.shape[2]) >= problem.key_lengths[:, None]
    spoiled = [t.masked_fill(behind[:, None, :, None], float("nan")) for t in (problem.k, problem.v)]
    with cuda_emulated.device(7):
        wanted = attention(problem)
        found = attention(problem._replace(k=spoiled[0], v=spoiled[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert spy.ran == ["attention_hopper"] * 2


def test_a_row_does_not_depend_on_its_batch(spy: Spy) -> None:
    problem = make_attention(AttentionCase("B2H2L150S260E64-br-left90"), torch.float16).problem
    with cuda_emulated.device(3, sms=3):
        whole = attention(problem)
        part = attention(problem._replace(q=problem.q[1:], k=problem.k[1:], v=problem.v[1:]))
    assert all(torch.equal(a[1:], b) for a, b in zip(whole, part, strict=True))
    assert spy.ran == ["attention_hopper"] * 2


REFUSED = [
    ("B1H2L70S70E32", "heads of 64 or 128 elements, not 32 and 32"),
    ("B1H2L70S70E64V128", "heads of 64 or 128 elements, not 64 and 128"),
    ("B1H2L90S90E64-packed", "no packed sequences"),
    ("B1H2L70S70E64-bias", "no bias"),
    ("B1H2L70S70E64-dropout", "no bias"),
    ("B1H2L70S70E64-left3-global", "no bias"),
    ("B1H4K1L1S600E64", "does not cut keys into parts"),
    ("B2H2L70S70E64-expanded", "not expanded"),
    ("B1H2L70S70E64-sliced", "rows at multiples of 16 bytes"),
]


@pytest.mark.parametrize(("text", "reason"), [pytest.param(*row, id=row[0]) for row in REFUSED])
def test_what_it_refuses_runs_on_the_other_kernel(text: str, reason: str, spy: Spy) -> None:
    compare(AttentionCase(text), torch.bfloat16, seed=1)
    assert spy.ran == ["attention_forward"]
    assert reason in spy.reasons[0]


def test_it_is_for_hopper_and_the_default_there(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase("B1H1L20S20E64")
    compare(case, torch.bfloat16, seed=1, capability=80)
    assert spy.reasons == ["it is for compute capability 90, not 80"] and spy.ran == ["attention_forward"]
    assert config.load({}).cuda_attention is None
    assert config.load({"FUSEDSEQ_CUDA_ATTENTION": "hopper"}).cuda_attention == "hopper"
    with pytest.raises(ValueError, match="FUSEDSEQ_CUDA_ATTENTION: expected one of mma, hopper or auto, got 'wgmma'"):
        config.load({"FUSEDSEQ_CUDA_ATTENTION": "wgmma"})
    for kind, capability, ran in (
        (None, 90, "attention_hopper"),
        (None, 80, "attention_forward"),
        ("mma", 90, "attention_forward"),
    ):
        monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_attention=kind))
        compare(case, torch.bfloat16, seed=1, capability=capability)
        assert spy.ran[-1] == ran
    assert len(spy.reasons) == 2  # where it is not wanted nobody asks


def test_a_direct_call_of_what_it_refuses_raises() -> None:
    problem = make_attention(AttentionCase("B1H1L9S9E32"), torch.bfloat16).problem
    call, out = cuda_attention.Call(problem), torch.empty_like(problem.q)
    arguments = (call.sizes, call.tensors(out, torch.empty(1, 1, 9)), call.numbers(), call.named(None))
    with cuda_emulated.device(), pytest.raises(RuntimeError, match="does not take this call: it is for heads of 64"):
        cuda_emulated.module().attention_hopper(*arguments)
