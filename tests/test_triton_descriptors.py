"""Attention's tiles through descriptors: when they are taken, and that they change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedseq import registry, use_backend
from fusedseq.ops.attention import run
from fusedseq.testing.attention_cases import AttentionCase, make_attention
from fusedseq.testing.attention_compare import evaluate_attention

if (reason := registry.backends()["triton"].missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fusedseq.backends import triton_attention
from fusedseq.backends.triton_strides import describable, describe
from fusedseq.kernels import attention_config as config
from fusedseq.kernels import attention_mask as bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] in (9, 10)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tiles (rows, width) that descriptors were made for."""
    found: list[tuple[int, int]] = []

    def watched(t: Tensor, rows: int, width: int) -> Any:
        found.append((rows, width))
        return describe(t, rows, width)

    monkeypatch.setattr(triton_attention, "describe", watched)
    return found


@pytest.mark.skipif(not NEW, reason="this GPU has no descriptors")
@pytest.mark.parametrize(
    ("text", "dtype", "backward"),
    [
        # heads narrower than tiles, keys that end within one
        ("B2H4K2L70S140E40V72-causal-blhe", torch.bfloat16, True),
        ("B1H2L70S200E16-left30-right10-sinks-lse", torch.float16, True),
        ("B2H2L40S130E24-causal-dropout-softcap", torch.bfloat16, False),
        ("B2H1L33S1E8-biasS", torch.float16, False),
    ],
)
def test_the_same_as_through_pointers(
    text: str, dtype: torch.dtype, backward: bool, taken: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_attention(AttentionCase(text), dtype, DEVICE)
    with use_backend("triton"):
        tiled = evaluate_attention(run, inputs)  # the parity matrix compares such calls with the specification
        assert len(taken) == (4 if backward else 2)
        monkeypatch.setattr(triton_attention, "tiled", lambda *args: False)
        taken.clear()
        plain = evaluate_attention(run, inputs)
    assert not taken
    for name, want in plain.items():
        # On a GPU tiles may differ in size, and sums then in order.
        near = 0 if DEVICE == "cpu" else 1e-2
        torch.testing.assert_close(tiled[name], want, rtol=near, atol=near)


@pytest.mark.skipif(not NEW, reason="this GPU has no descriptors")
@pytest.mark.parametrize("text", ["B1H3L130S130E16-causal", "B1H4K2L70S130E24-left40-causal", "B3H1L40S40E8-causal"])
def test_the_same_where_programs_are_dealt_their_tiles(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than programs, and fewer; all of one turn, and a part of the last."""
    inputs = make_attention(AttentionCase(text), torch.bfloat16, DEVICE)
    ran: list[bool] = []

    def dealt(key: Any, shipped: config.Tile, others: Any, launch: Any, x: Tensor) -> config.Tile:
        found = [one for one in others() if one.dealt]
        ran.append(bool(found))
        return found[0] if found else shipped

    with use_backend("triton"):
        want = run(inputs.problem)
        monkeypatch.setattr(triton_attention, "choose", dealt)
        got = run(inputs.problem)
    assert ran == [True]
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "text", ["B2H2L40S70E16-lengths", "B1H2L40S70E16-packed", "B1H2L40S70E16-left9-global", "B1H2L40S70E12"]
)
def test_pointers_where_a_descriptor_would_not_do(text: str, taken: list[tuple[int, int]]) -> None:
    with use_backend("triton"):
        run(make_attention(AttentionCase(text), torch.bfloat16, DEVICE).problem)
    assert not taken


def test_what_a_descriptor_can_hold() -> None:
    t = torch.zeros(2, 3, 5, 16, dtype=torch.bfloat16)
    assert describable(t) and describable(t.transpose(1, 2)) and describable(t[:, :, ::2])
    assert describable(t[:1, :1, :1, :3])  # what there is one of has no stride
    assert not describable(t[..., 1:])  # not aligned
    assert not describable(torch.zeros(2, 3, 5, 12, dtype=torch.bfloat16))
    assert not describable(t.transpose(2, 3))
    assert not describable(t[:, :1].expand(2, 3, 5, 16))
    assert not describable(t[:0])
    made = describe(t[:1, :, :, :3], 64, 16)
    assert (made.shape, made.strides, made.block_shape) == ([1, 3, 5, 3], [8, 80, 16, 1], [1, 1, 64, 16])


def test_the_choice() -> None:
    half, new = torch.bfloat16, (9, 0)
    assert config.tiled("forward", half, new, bits.CAUSAL.value | bits.DROPOUT.value, 1000)
    assert config.tiled("dq", half, new, bits.CAUSAL.value, 1000)
    assert not config.tiled("dq", half, new, bits.CAUSAL.value | bits.DROPOUT.value, 1000)
    for kernel in ("forward", "dq"):
        assert not config.tiled(kernel, half, (8, 0), 0, 1000)
        assert not config.tiled(kernel, half, (12, 0), 0, 1000)
        assert not config.tiled(kernel, torch.float32, new, 0, 1000)
        assert not config.tiled(kernel, half, new, 0, 8)
        for bit in (bits.LENGTHS, bits.PACKED, bits.GLOBAL, bits.SPLIT, bits.DENSE):
            assert not config.tiled(kernel, half, new, bit.value, 1000)


def test_tiles_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "INTERPRETING", False)
    plain, tiled = (config.tile("forward", 128, torch.bfloat16, (9, 0), f, 1000) for f in (0, bits.TILED.value))
    assert tiled == plain._replace(stages=plain.stages + 1)
    heavy = bits.DROPOUT.value
    assert config.tile("forward", 128, torch.bfloat16, (9, 0), bits.TILED.value | heavy, 1000) == config.tile(
        "forward", 128, torch.bfloat16, (9, 0), heavy, 1000
    )
