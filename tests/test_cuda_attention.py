"""The CUDA attention kernels on the emulator, beyond parity: what they must not read, random bits, independence of the
order of threads and of the batch, parts of keys, packed sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import cuda_emulated
import pytest
import torch

import fusedseq
from fusedseq import config, registry
from fusedseq.backends import cuda, cuda_attention
from fusedseq.ops.attention import run
from fusedseq.reference import attention as reference
from fusedseq.reference.attention import BOTTOM_RIGHT, TOP_LEFT, Problem
from fusedseq.testing.attention_cases import AttentionCase, AttentionInputs, make_attention
from fusedseq.testing.attention_compare import compare_with, evaluate_attention, judge_attention


@pytest.fixture(autouse=True)
def _emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The emulated device takes the Hopper kernels otherwise, which have tests of their own.
    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_attention="mma"))
    with cuda.emulated(cuda_emulated.module()), fusedseq.use_backend("cuda"):
        yield


def forward(p: Problem, seed: int = 0, **device: int) -> tuple[torch.Tensor, torch.Tensor]:
    with cuda_emulated.device(seed, **device), torch.no_grad():
        return run(p)


def problem(text: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Problem:
    return make_attention(AttentionCase(text), dtype).problem._replace(**changes)


def right(text: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> None:
    """The case, with these changes, keeps to the error rule."""
    made = make_attention(AttentionCase(text), dtype)
    base = compare_with(AttentionInputs(made.case, made.problem._replace(**changes), made.dout, None))
    out, lse = forward(base.inputs.problem)
    found = {"out": out, "lse": lse}
    only = dataclasses.replace(base, truth={name: base.truth[name] for name in found})
    wrong = [str(error) for error in judge_attention(found, only) if not error.ok]
    assert not wrong, wrong


STRUCTURES = {
    "tiles": "B1H2L140S200E16-br",
    "window": "B2H2L77S77E40-left9-right5-lengths",
    "global": "B2H2L65S65E16-left7-right0-global-dropout",
    "table": "B2H4K2L33S130E16-dense-bias-softcap-alibi-sinks",
    "packed": "B1H4K2L100S100E16-packed-causal",
    "parts": "B2H4K2L2S600E16-left9-global-lengths-sinks",
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_any_order_of_threads_gives_the_same_bits(name: str) -> None:
    p = problem(STRUCTURES[name])
    first = forward(p, 0)
    for seed in (1, 2):
        for one, other in zip(first, forward(p, seed), strict=True):
            assert torch.equal(one, other), f"{name}: the result depends on the order in which threads run"


@pytest.mark.parametrize("name", ["tiles", "window", "global", "table", "parts"])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    p = problem(STRUCTURES[name].replace("-dropout", ""))
    out, lse = forward(p)
    for b in range(p.q.shape[0]):

        def of_row(t: torch.Tensor | None, b: int = b) -> torch.Tensor | None:
            return t if t is None or t.shape[0] == 1 else t[b : b + 1]

        alone = forward(p._replace(
            q=p.q[b : b + 1], k=p.k[b : b + 1], v=p.v[b : b + 1], bias=of_row(p.bias), dense=of_row(p.dense),
            key_lengths=of_row(p.key_lengths), global_keys=of_row(p.global_keys),
        ))  # fmt: skip
        assert torch.equal(alone[0][0], out[b])
        assert torch.equal(alone[1][0], lse[b])


def test_what_nobody_sees_is_not_read() -> None:
    p = problem("B2H2L70S200E16-lengths")
    for b, length in enumerate(p.key_lengths.tolist()):  # type: ignore[union-attr]
        p.k[b, :, length:], p.v[b, :, length:] = float("nan"), float("inf")
    out, lse = forward(p)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    # Tiles of 64 keys that no row's window meets; 30 rows see keys up to 49.
    p = problem("B1H2L30S200E16", left=20, right=20)
    p.k[..., 64:, :], p.v[..., 64:, :] = float("nan"), float("nan")
    assert forward(p)[0].isfinite().all()
    # And those that a table hides from all.
    dense = torch.ones(1, 1, 30, 200, dtype=torch.bool)
    dense[..., 64:128] = False
    p = problem("B1H2L30S200E16", dense=dense)
    p.k[..., 64:128, :], p.v[..., 64:128, :] = float("nan"), float("nan")
    assert forward(p)[0].isfinite().all()


@pytest.mark.parametrize("extra", ["", "-packed", "-left3-right2-global"])
def test_dropout_is_the_specification_s(extra: str) -> None:
    """With equal logits and one-hot values the output is the probabilities after dropout."""
    B = 1 if "packed" in extra else 2
    p = problem(f"B{B}H3L20S130E8V130-dropout{extra}", torch.float16, scale=0.0)
    p = p._replace(v=torch.eye(130, dtype=torch.float16).expand(B, 3, 130, 130))
    kept = (reference.dropout_scale(p) != 0) & reference.visible(p)
    assert torch.equal(forward(p)[0] != 0, kept)
    assert not forward(p._replace(dropout_p=1.0))[0].any()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_or_level_the_order_of_logits(scale: float) -> None:
    right("B1H2L70S90E16-causal", scale=scale)


@pytest.mark.parametrize("text", ["B1H2L40S300E16", "B1H2L70S90E128-bias", "B1H2L20S130E160-lse"])
def test_maxima_that_rise_by_much_and_by_little(text: str) -> None:
    for scale in (0.4, 4.0):  # most rises leave earlier sums as they are, or most make them smaller
        right(text, scale=scale)


@pytest.mark.parametrize("extra", ["", "-softcap"])
@pytest.mark.parametrize(("left", "right"), [(30, -1), (-1, 30), (70, 80)])
def test_windows_over_several_tiles(left: int, right: int, extra: str) -> None:
    """Tiles that all rows see, that some see and that none sees, on either side and for both passes."""
    made = make_attention(AttentionCase(f"B1H2L140S200E16{extra}"), torch.bfloat16)
    windowed = made.problem._replace(left=left, right=right)
    base = compare_with(AttentionInputs(made.case, windowed, made.dout, None))
    with cuda_emulated.device(5):
        outcome = evaluate_attention(run, base.inputs)
    wrong = [str(error) for error in judge_attention(outcome, base) if not error.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("causal", [TOP_LEFT, BOTTOM_RIGHT])
def test_packed_sequences_are_those_that_run_alone(causal: int) -> None:
    lengths, keys = [40, 0, 129, 17, 0], [64, 10, 140, 1, 0]
    p = problem(f"B1H4K2L{sum(lengths) + 3}S{sum(keys) + 2}E16", causal=causal, right=0)
    ends = [torch.tensor([0, *n]).cumsum(0) for n in (lengths, keys)]
    out, lse = forward(p._replace(cu_q=ends[0], cu_k=ends[1]))
    for n in range(len(lengths)):
        (q0, q1), (k0, k1) = ends[0][n : n + 2].tolist(), ends[1][n : n + 2].tolist()
        if q0 == q1:
            continue
        alone = forward(p._replace(q=p.q[:, :, q0:q1], k=p.k[:, :, k0:k1], v=p.v[:, :, k0:k1]))
        assert torch.equal(alone[0], out[:, :, q0:q1])
        assert torch.equal(alone[1], lse[:, :, q0:q1])
    behind = sum(lengths)
    assert not out[:, :, behind:].any()
    assert (lse[:, :, behind:] == float("-inf")).all()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows_cut_their_keys_into_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"B2H8K2L{rows}S700E64-br-lengths-sinks"
    p = problem(text)
    assert cuda_attention.Call(p).parts() == (3, 256)
    cut = forward(p)
    monkeypatch.setattr(cuda_attention, "MANY_KEYS", 10**6)
    assert cuda_attention.Call(p).parts() == (1, 700)
    whole = forward(p)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut[0], whole[0], rtol=2**-7, atol=2**-9)


def test_parts_grow_with_the_keys() -> None:
    p = problem("B1H2L1S512E8")
    long = p._replace(k=p.k[:, :, :1].expand(-1, -1, 100_000, -1), v=p.v[:, :, :1].expand(-1, -1, 100_000, -1))
    count, size = cuda_attention.Call(long).parts()
    assert (count, size) == (49, 2048)
    assert count * size >= 100_000


def test_a_device_without_room_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"attention_forward \(bfloat16 B=1 Hq=2 .*E=16.*\): "):
        forward(problem("B1H2L30S40E16"), shared=16 * 1024)


def test_it_says_what_it_does_not_take() -> None:
    def reason(**changes: Any) -> str | None:
        return cuda.supports(registry.attention_call(problem("B1H1L2S3E8"), False)._replace(**changes))

    assert reason() is None
    assert "not torch.float32" in (reason(dtype=torch.float32) or "")
    assert "these have 257" in (reason(Ev=257) or "")
    assert str(2**29) in (reason(S=2**29) or "")
    assert f"this one has {2**30}" in (reason(L=2**28, Hq=4) or "")
