"""The Hopper forward kernel against the float64 truth, run by the emulator, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import cuda_emulated
import pytest
import torch

import fusedseq
from fusedseq import config, registry
from fusedseq.backends import cuda
from fusedseq.ops.attention import run as attention
from fusedseq.testing.attention_cases import AttentionCase
from fusedseq.testing.attention_compare import attention_baseline, judge_attention

# Tiles of 128 queries and 128 keys: one, several, ends within them; every structure that the kernel takes.
TAKEN = """
B1H1L1S1E64
B1H1L128S128E64
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
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that ran."""
    core, ran = cuda_emulated.module(), list[str]()

    class Spy:
        def __getattr__(self, name: str):
            if name in ("attention_hopper", "attention_forward"):
                ran.append(name)
            return getattr(core, name)

    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_attention="hopper"))
    with cuda.emulated(Spy()), fusedseq.use_backend("cuda"):
        yield ran


def compare(case: AttentionCase, dtype: torch.dtype, seed: int, **device: int) -> None:
    base = attention_baseline(case, dtype)
    with cuda_emulated.device(seed, **device), registry.record() as choices:
        out, lse = attention(base.inputs.problem)
    assert {choice.backend for choice in choices} == {"cuda"}
    found = {"out": out, "lse": lse}
    truth = dataclasses.replace(base, truth={name: base.truth[name] for name in found})
    wrong = [str(error) for error in judge_attention(found, truth) if not error.ok]
    assert not wrong, "\n".join(wrong)


CASES = [pytest.param(AttentionCase(text), id=text) for text in TAKEN.split()]


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f16"])
@pytest.mark.parametrize("case", CASES)
def test_parity(case: AttentionCase, dtype: torch.dtype, _hopper: list[str]) -> None:
    compare(case, dtype, seed=1)
    assert _hopper == ["attention_hopper"]


@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("text", ["B1H3L300S390E64-br-left200", "B3H1L200S300E128-lengths", "B1H1L130S640E64"])
def test_many_tiles_a_cta_under_several_schedules(text: str, seed: int, _hopper: list[str]) -> None:
    compare(AttentionCase(text), torch.bfloat16, seed, sms=1 + seed % 2)
    assert _hopper == ["attention_hopper"]
