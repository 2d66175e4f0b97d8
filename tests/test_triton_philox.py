"""Philox in Triton: the bits of the specification, for rows of tensors and for attention, in either form."""

from __future__ import annotations

import pytest
import torch

import fusedseq
from fusedseq import registry
from fusedseq.backends.triton_dropout import dropout_arguments
from fusedseq.reference.attention import Problem
from fusedseq.reference.attention import dropout_scale as attention_scale
from fusedseq.reference.dropout import dropout_scale

if (reason := registry.backends()["triton"].missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from fusedseq.kernels import philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = (0, 1, -1, 0x1234567890ABCDEF, -(2**63))


@triton.jit
def _masks(seed, limit, blocks, elements, first_row, c2, M: tl.constexpr, BLOCKS: tl.constexpr):
    row = first_row + tl.arange(0, M).to(tl.int64)
    column = tl.arange(0, 64 * BLOCKS)
    key = tl.load(seed)
    at = tl.arange(0, M)[:, None] * 64 * BLOCKS + column[None, :]
    whole = philox.kept_blocks(key, limit, 0, row, c2, row >> 32, BLOCKS)
    tl.store(blocks + at, whole.to(tl.int8))
    tl.store(elements + at, philox.kept(key, limit, column, row, c2, row >> 32).to(tl.int8))


def _run(seed: int, dropout_p: float, first_row: int = 0, c2: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    key, limit, _ = dropout_arguments(dropout_p, torch.tensor(seed), torch.device(DEVICE))
    blocks, elements = (torch.empty(16, 128, dtype=torch.int8, device=DEVICE) for _ in range(2))
    _masks[(1,)](key, limit, blocks, elements, first_row, c2, M=16, BLOCKS=2)
    return blocks.bool().cpu(), elements.bool().cpu()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dropout_p", [0.25, 1e-9, 1.0])
def test_rows(seed: int, dropout_p: float) -> None:
    want = dropout_scale((16, 128), dropout_p, torch.tensor(seed), torch.float32) != 0
    blocks, elements = _run(seed, dropout_p)
    if dropout_p < 1:
        assert torch.equal(blocks, want)
        assert torch.equal(elements, want)
    else:  # all but one word in 2^32 is below the threshold; the scale of 0 sees to the rest
        assert not blocks.any()
        assert not want.any()


def test_rows_beyond_32_bits() -> None:
    first = 2**32 - 8
    row = torch.arange(first, first + 16).unsqueeze(1)
    column = torch.arange(128)
    counter = (16 * (column // 64) + column % 16).expand(16, -1)
    low = 2**32 - 1
    words = fusedseq.reference.attention.philox(
        (counter, (row & low).expand_as(counter), torch.zeros_like(counter), (row >> 32).expand_as(counter)), (7, 0)
    )
    which = ((column // 16) % 4).expand(16, -1).unsqueeze(0)
    want = torch.stack(words).gather(0, which)[0] >= 2**31
    blocks, elements = _run(7, 0.5, first)
    assert torch.equal(blocks, want)
    assert torch.equal(elements, want)


def test_attention() -> None:
    # The specification's own mask of head 3 in batch entry 0.
    q, k = torch.zeros(1, 4, 16, 8), torch.zeros(1, 4, 128, 8)
    want = attention_scale(Problem(q, k, k, seed=torch.tensor(99), dropout_p=0.5))[0, 3] != 0
    blocks, elements = _run(99, 0.5, c2=3)
    assert torch.equal(blocks, want)
    assert torch.equal(elements, want)
