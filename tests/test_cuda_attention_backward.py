"""The backward pass of the CUDA attention, run by the emulator: what it owes beyond being right.

That it is right, for every structure, is in tests/test_cuda_parity.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import cuda_emulated
import pytest
import torch
from torch import Tensor

import fusedseq
from fusedseq import config, registry
from fusedseq.backends import cuda, cuda_attention
from fusedseq.ops.attention import run
from fusedseq.reference.attention import Problem
from fusedseq.testing.attention_cases import AttentionCase, AttentionInputs, make_attention
from fusedseq.testing.attention_compare import compare_with, evaluate_attention, judge_attention

NAMES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


@pytest.fixture(autouse=True)
def _emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The emulated device takes the Hopper kernels otherwise, which have tests of their own.
    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_attention="mma"))
    with cuda.emulated(cuda_emulated.module()), fusedseq.use_backend("cuda"):
        yield


def gradients(p: Problem, dout: Tensor | None, dlse: Tensor | None, needs: tuple[bool, ...] = (True,) * 6) -> Any:
    out, lse = cuda_attention.attention_forward(p)
    return cuda_attention.attention_backward(p, out, lse, dout, dlse, needs)


def inputs_of(text: str, dtype: torch.dtype = torch.bfloat16) -> AttentionInputs:
    return make_attention(AttentionCase(text), dtype)


# One of each pass, structure and width; several tiles of everything.
ORDERS = [
    "B2H4K2L70S90E64-causal-lse",
    "B1H2L40S70E80V130-biasH-softcap-alibi-sinks-dropout-lse",
    "B2H2L50S150E32-left7-right3-global-dense-lse",
    "B1H4K2L90S80E24-packed-biasS-dropout",
    # Tiles of 32 keys that share dropout's bits of a block of 64, and some that reach into two.
    "B1H2L150S150E128-packed-dropout",
]


@pytest.mark.parametrize("text", ORDERS)
def test_any_order_of_threads_gives_the_same_bits(text: str) -> None:
    x = inputs_of(text)
    with cuda_emulated.device(0):
        first = gradients(x.problem, x.dout, x.dlse)
    for seed in range(1, 4):
        # Fewer SMs change which blocks run at the same time.
        with cuda_emulated.device(seed, sms=seed):
            again = gradients(x.problem, x.dout, x.dlse)
        for name, a, b in zip(NAMES, first, again, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b), f"d{name} depends on the order in which threads run (seed {seed})"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("text", ORDERS)
def test_other_numbers_and_schedules(text: str, dtype: torch.dtype, seed: int) -> None:
    x = make_attention(AttentionCase(text), dtype, seed=1 + seed)
    base = compare_with(x)
    with cuda_emulated.device(20 + seed, sms=3):
        wrong = [str(e) for e in judge_attention(evaluate_attention(run, x), base) if not e.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text", ["B3H4K2L70S90E64-lengths-br-lse", "B3H2L33S40E160-left9-global-alibi-sinks-lse"])
def test_a_row_does_not_depend_on_its_batch(text: str) -> None:
    x = inputs_of(text)
    p = x.problem

    def pick(t: Tensor | None, b: int) -> Tensor | None:
        return None if t is None else t[b : b + 1] if t.shape[0] == 3 else t

    with cuda_emulated.device():
        whole = gradients(p, x.dout, x.dlse)
        for b in range(3):
            one = p._replace(
                q=p.q[b : b + 1], k=p.k[b : b + 1], v=p.v[b : b + 1], key_lengths=pick(p.key_lengths, b),
                global_keys=pick(p.global_keys, b),
            )  # fmt: skip
            alone = gradients(one, x.dout[b : b + 1], pick(x.dlse, b))
            for name, a, c in zip(NAMES[:3], whole, alone, strict=False):
                assert torch.equal(a[b : b + 1], c), f"d{name} of batch row {b}"


def test_a_sequence_does_not_depend_on_its_pack() -> None:
    x = inputs_of("B1H4K2L190S170E48-causal-lse")
    ends = [0, 70, 75, 190], [0, 66, 80, 170]
    cu_q, cu_k = (torch.tensor(t) for t in ends)
    assert x.dlse is not None
    with cuda_emulated.device():
        packed = gradients(x.problem._replace(cu_q=cu_q, cu_k=cu_k), x.dout, x.dlse)
        for q0, q1, k0, k1 in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
            p = x.problem
            one = p._replace(q=p.q[:, :, q0:q1], k=p.k[:, :, k0:k1], v=p.v[:, :, k0:k1])
            dq, dk, dv, *_ = gradients(one, x.dout[:, :, q0:q1], x.dlse[:, :, q0:q1])
            assert torch.equal(packed[0][:, :, q0:q1], dq)
            assert torch.equal(packed[1][:, :, k0:k1], dk)
            assert torch.equal(packed[2][:, :, k0:k1], dv)


def test_what_is_not_wanted_is_not_made() -> None:
    x = inputs_of("B2H4K2L40S50E32-biasH-alibi-sinks-causal-lse")
    with cuda_emulated.device():
        whole = gradients(x.problem, x.dout, x.dlse)
        for i, name in enumerate(NAMES):
            needs = tuple(n == i for n in range(6))
            some = gradients(x.problem, x.dout, x.dlse, needs)
            assert [g is not None for g in some] == list(needs)
            assert torch.equal(some[i], whole[i]), f"d{name} alone"


@pytest.mark.parametrize("which", ["dout", "dlse"])
def test_a_missing_upstream_gradient_counts_as_zero(which: str) -> None:
    x = inputs_of("B2H2L20S30E32-alibi-sinks-lse")
    assert x.dlse is not None
    dout, dlse = (None, x.dlse) if which == "dout" else (x.dout, None)
    zeros = (torch.zeros_like(x.dout), x.dlse) if which == "dout" else (x.dout, torch.zeros_like(x.dlse))
    with cuda_emulated.device():
        for a, b in zip(gradients(x.problem, dout, dlse), gradients(x.problem, *zeros), strict=True):
            assert a is b is None or torch.equal(a, b)


def test_memory_that_is_not_finite_reaches_no_gradient() -> None:
    """Keys behind a length and rows outside all packed sequences hold NaN."""
    nan = float("nan")
    x = inputs_of("B2H2L20S40E32-causal")
    p = x.problem
    lengths = torch.tensor([7, 33])
    k, v = p.k.clone(), p.v.clone()
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = nan
        v[b, :, n:] = nan
    with cuda_emulated.device():
        clean = gradients(p._replace(key_lengths=lengths), x.dout, None)
        spoilt = gradients(p._replace(k=k, v=v, key_lengths=lengths), x.dout, None)
    for name, a, b in zip(NAMES[:3], clean, spoilt, strict=False):
        assert torch.equal(a, b), name
    assert all(not clean[i][b, :, n:].any() for i in (1, 2) for b, n in enumerate(lengths.tolist()))

    x = inputs_of("B1H2L20S40E32")
    cu_q, cu_k = torch.tensor([0, 4, 15]), torch.tensor([0, 9, 31])
    q, k, v, dout = (t.clone() for t in (*x.problem[:3], x.dout))
    for t, n in ((q, 15), (dout, 15), (k, 31), (v, 31)):
        t[:, :, n:] = nan
    with cuda_emulated.device():
        found = gradients(x.problem._replace(q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k), dout, None)
    for name, g, n in zip(NAMES, found, (15, 31, 31), strict=False):
        assert g.isfinite().all(), name
        assert g[:, :, :n].any() and not g[:, :, n:].any(), name


def test_double_backward_is_that_of_the_specification() -> None:
    x = inputs_of("B1H2L9S12E16-causal-biasH-lse")
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for t in x.problem[:4]]  # type: ignore[union-attr]
    found = {}
    for backend in ("cuda", "reference"):
        with cuda_emulated.device(), fusedseq.use_backend(backend):
            leaves = [t.detach().requires_grad_() for t in x.problem[:4] if t is not None]
            out, lse = run(Problem(*leaves, *x.problem[4:]))
            first = torch.autograd.grad([out, lse], leaves, [x.dout, x.dlse], create_graph=True)
            loss = sum((g.float() * w).sum() for g, w in zip(first, weights, strict=True))
            found[backend] = torch.autograd.grad(loss, leaves)
    for name, a, b in zip(NAMES, found["cuda"], found["reference"], strict=False):
        assert b.any() and torch.equal(a, b), name


def test_a_device_without_room_for_wide_heads_is_refused() -> None:
    x = inputs_of("B1H1L4S4E256")
    leaf = x.problem.q.detach().requires_grad_()
    with cuda_emulated.device(shared=99 * 1024):
        with pytest.raises(registry.BackendError, match=r"backward pass wants \d+ bytes of shared memory"):
            run(x.problem._replace(q=leaf))
        run(x.problem)
        narrow = inputs_of("B1H1L4S4E64")
        run(narrow.problem._replace(q=narrow.problem.q.detach().requires_grad_()))[0].sum().backward()


def test_the_shared_memory_asked_for_is_what_the_kernels_take() -> None:
    """With a byte less than the most that a call may take, a launch fails; with that many it does not."""
    core = cuda_emulated.module()
    for text in ("B1H1L4S4E64-biasH-dropout", "B1H1L4S4E128-biasH-dropout", "B1H1L4S4E256-biasH-dropout"):
        x = inputs_of(text)
        wanted = core.attention_backward_shared(x.problem.q.shape[3], x.problem.v.shape[3], True, True)
        with cuda_emulated.device():
            out, lse = cuda_attention.attention_forward(x.problem)
        arguments = (x.problem, out, lse, x.dout, None, (True,) * 4 + (False,) * 2)
        with cuda_emulated.device(shared=wanted):
            cuda_attention.attention_backward(*arguments)
        with cuda_emulated.device(shared=wanted - 1), pytest.raises(RuntimeError, match="attention_backward_"):
            cuda_attention.attention_backward(*arguments)
