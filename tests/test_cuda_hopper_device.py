"""The Hopper kernels on a GPU: the emulator's cases and longer ones; a second run gives the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_cuda_hopper import TAKEN, Spy
from test_cuda_hopper_backward import BACKWARD, FORWARD
from test_cuda_hopper_backward import TAKEN as TAKEN_BACKWARD

import fusedseq
from fusedseq import config
from fusedseq.backends import cuda
from fusedseq.ops.attention import run as attention
from fusedseq.reference.attention import Problem
from fusedseq.testing.attention_cases import AttentionCase, make_attention
from fusedseq.testing.attention_compare import attention_baseline, evaluate_attention, judge_attention

# More tiles than a GPU has SMs, rings that go round many times.
LONG = """
B1H2L1024S1024E64-causal-lse
B1H2L1000S2100E128-br-lse
B2H64L300S513E64-lengths-lse
B1H2L2048S2048E128-left500-right0-lse
B8H8K2L260S700E128-br-lengths-blhe
"""


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the kernel is for compute capability 9.0"
    return cuda.missing()


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_attention="hopper"))
    core = Spy(cuda.core())
    monkeypatch.setattr(cuda, "_real", core)
    with fusedseq.use_backend("cuda"):
        yield core


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("text", (TAKEN + LONG).split())
def test_cuda_hopper_parity(text: str, dtype: torch.dtype, spy: Spy) -> None:
    base = attention_baseline(AttentionCase(text), dtype)

    def there(value: Any) -> Any:
        return value.cuda() if isinstance(value, torch.Tensor) else value

    problem = Problem(*map(there, base.inputs.problem))
    with torch.no_grad():
        (out, lse), again = attention(problem), attention(problem)
    assert spy.ran == ["attention_hopper"] * 2, spy.reasons
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    found = {"out": out.cpu(), "lse": lse.cpu()}
    truth = dataclasses.replace(base, truth={name: base.truth[name] for name in found})
    wrong = [str(error) for error in judge_attention(found, truth) if not error.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("text", (TAKEN_BACKWARD + LONG).split())
def test_cuda_hopper_backward_parity(text: str, dtype: torch.dtype, spy: Spy) -> None:
    base = attention_baseline(AttentionCase(text), dtype)
    inputs = make_attention(AttentionCase(text), dtype, "cuda")
    found, again = evaluate_attention(attention, inputs), evaluate_attention(attention, inputs)
    assert spy.ran == [FORWARD, BACKWARD] * 2, spy.reasons
    assert all(torch.equal(t, again[name]) for name, t in found.items())
    wrong = [str(error) for error in judge_attention(found, base) if not error.ok]
    assert not wrong, "\n".join(wrong)
