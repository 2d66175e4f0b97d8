"""The scan kernels as they ship, for `aot`: every cell in float32 and bfloat16, with all that is optional."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fusedseq.kernels import pointwise, scan_backward, scan_forward
from fusedseq.kernels.aot import CAPABILITIES, Variant
from fusedseq.kernels.runtime import TYPES
from fusedseq.kernels.scan_plan import MANY, PROGRAMS, RESIDENT, RESIDENT_MANY, STREAMED, plan

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu")
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_SIZES = dict.fromkeys(("T", "B", "N", "H", "R", "time_stride", "batch_stride"), "i32")
# What most calls bring: time first, everything a multiple of 16. Loads are then of 16 bytes, and run ahead.
_ALIGNED = dict.fromkeys(("B", "N", "H", "R", "time_stride"), "i32:16") | {"batch_stride": 1}


def _common(
    cell: str, H: int, dtype: torch.dtype, B: int = 16, aligned: bool = False, capability: int = 90
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that all kernels share, and the options of the compiler."""
    H = H if aligned else H - 1  # where it makes the plan another
    p = plan(cell, H, H, B, 2, dtype, divmod(capability, 10))
    arguments: dict[str, Any] = {
        **_SIZES, **(_ALIGNED if aligned else {}), "CELL": cell, "BM": p.BM, "BN": p.BN, "BK": p.BK,
        "DOT": TYPES[dtype], "PRECISION": "ieee",
        "lengths": "*i64", "starts": None, "resets": "*u8", "s": "i32",
    }  # fmt: skip
    return arguments, {"warps": p.warps, "stages": p.stages, "registers": p.registers}


def _forward(cell: str, dtype: torch.dtype, projected: bool) -> dict[str, Any]:
    t = f"*{TYPES[dtype].name}"
    lstm = cell == "lstm"
    return {
        "gx": "*fp32", "w0": t, "w1": t, "biases": "*fp32", "p_0": t if projected else None,
        "p_1": t if projected else None, "h": "*fp32", "c": "*fp32" if lstm else None, "mid": "*fp32", "y": t,
        "c_all": t if lstm else None, "reserve": None if cell.startswith("rnn") else "*fp32",
        "KEEP": 0 if cell.startswith("rnn") else 1, "PROJECTED": projected,
    }  # fmt: skip


def _backward(cell: str, dtype: torch.dtype, projected: bool) -> dict[str, Any]:
    t = f"*{TYPES[dtype].name}"
    lstm, gru = cell == "lstm", cell.startswith("gru")
    return {
        "w0": t, "w1": t, "p_0": t if projected else None, "p_1": t if projected else None,
        "reserve": "*fp32" if lstm or gru else None, "y": "*fp32" if cell == "rnn_tanh" else t,
        "hp": t if gru else None, "c0": "*fp32" if lstm else None, "dy": t, "dc_all": t if lstm else None,
        "dh": "*fp32",
        "dc": "*fp32" if lstm else None, "carry": "*fp32" if gru else None, "dhr": t if projected else None, "dg": t,
        "PROJECTED": projected,
    }  # fmt: skip


def variants() -> Iterator[Variant]:
    for dtype in (torch.float32, torch.bfloat16):
        for cell in CELLS:
            yield from _cell(cell, dtype)
            yield from _pointwise(cell, dtype)
    yield from _edges()


def _edges() -> Iterator[Variant]:
    """What the compiler takes more seriously than the interpreter: arguments left out, sizes of 1 (constants)."""
    dtype = torch.bfloat16
    left_out = ("biases", "c_all", "lengths", "resets", "c0", "dy", "dc_all")
    ones = dict.fromkeys(("B", "N", "time_stride", "batch_stride"), 1)
    for cell, H, kernels in (
        ("lstm", 64, (scan_forward.resident_forward, scan_backward.resident_backward)),
        ("gru", 128, (scan_forward.streamed_forward, scan_backward.streamed_backward)),
        ("lstm", 128, (scan_forward.streamed_forward, scan_backward.streamed_backward)),
        ("gru_reset_before", 512, (scan_forward.step_forward, scan_backward.step_backward)),
    ):
        common, options = _common(cell, H, dtype)
        for make, kernel in zip((_forward, _backward), kernels, strict=True):
            whole = {**common, **make(cell, dtype, False), "PHASE": 0}
            bare = {**whole, **dict.fromkeys(left_out), "starts": "*i64", "lengths": "*i64"}
            if make is _forward:
                bare |= {"KEEP": 2 if cell == "lstm" else 0, "reserve": "*fp32" if cell == "lstm" else None}
            for word, arguments in (("bare", bare), ("ones", whole | ones)):
                name = f"{cell}-{kernel.__name__}-{word}"
                yield Variant(name, kernel, arguments, dots=True, everywhere=False, **options)


KERNELS = {
    "resident": (scan_forward.resident_forward, scan_backward.resident_backward),
    "streamed": (scan_forward.streamed_forward, scan_backward.streamed_backward),
    "step": (scan_forward.step_forward, scan_backward.step_backward),
}


def _cell(cell: str, dtype: torch.dtype) -> Iterator[Variant]:
    half = dtype != torch.float32
    for kind, H in (("resident", RESIDENT[dtype]), ("streamed", STREAMED), ("step", 2 * STREAMED)):
        # The largest of their kind, and the ones that multiply by what the architecture has.
        largest = half and kind != "step" and cell in ("lstm", "gru_reset_before")
        common, options = _common(cell, H, dtype)
        yield from _passes(cell, kind, dtype, "", common, everywhere=largest, seldom=cell == "rnn_relu", **options)
        common, options = _common(cell, H, dtype, aligned=True)
        yield from _passes(cell, kind, dtype, "-aligned", common, everywhere=False, seldom=not largest, **options)
    if not half:
        return
    for kind, H in (("resident", RESIDENT_MANY), ("streamed", STREAMED), ("step", 2 * STREAMED)):
        for capability in CAPABILITIES:
            B = PROGRAMS * MANY
            if plan(cell, H, H, B, 2, dtype, divmod(capability, 10)).BM == MANY:
                common, options = _common(cell, H, dtype, B, True, capability)
                options |= {"everywhere": False, "seldom": cell == "rnn_relu", "capabilities": (capability,)}
                yield from _passes(cell, kind, dtype, f"-{MANY}rows", common, **options)


def _passes(
    cell: str, kind: str, dtype: torch.dtype, what: str, common: dict[str, Any], **options: Any
) -> Iterator[Variant]:
    """Forward and backward; each phase of a step, and with a projection too where there may be one."""
    for projected in (False, True) if cell == "lstm" and kind != "resident" else (False,):
        two = kind == "step" and (projected or cell == "gru_reset_before")
        for phase in (0, 1) if two else (0,):
            name = f"{cell}{'_projected' if projected else ''}-{kind}-{SHORT[dtype]}{what}"
            name += f"-phase{phase}" if two else ""
            for make, kernel, direction in zip(
                (_forward, _backward), KERNELS[kind], ("forward", "backward"), strict=True
            ):
                arguments = {**common, **make(cell, dtype, projected), "PHASE": phase}
                yield Variant(f"{name}-{direction}", kernel, arguments, dots=dtype != torch.float32, **options)


def _pointwise(cell: str, dtype: torch.dtype) -> Iterator[Variant]:
    """Of a step alone: products in float32 as the backend makes them, units side by side and a multiple of 16."""
    t = f"*{TYPES[dtype].name}"
    lstm, gru = cell == "lstm", cell.startswith("gru")
    operands = ("gx", "gh", "y", "h", "c", "dh", "dc")
    for phase in (0, 1) if cell == "gru_reset_before" else (0,):
        arguments: dict[str, Any] = {
            "B": "i32", "H": "i32:16", "CELL": cell, "PHASE": phase, "BM": 2, "BN": 512,
            **{f"{name}_row": "i32:16" for name in operands}, **{f"{name}_unit": 1 for name in operands},
            "gx": "*fp32", "gh": "*fp32", "b_ih": t, "b_hh": t, "h": t if gru else None, "c": t if lstm else None,
            "h_new": t, "c_new": t if lstm else None, "kept": "*fp32" if lstm or gru else None,
            "y": None if lstm or gru else t, "dh": "*fp32" if phase else t, "dc": t if lstm else None, "dg": t,
            "dh_past": "*fp32" if gru else None, "dc_past": t if lstm else None,
        }  # fmt: skip
        name = f"{cell}-pointwise-{SHORT[dtype]}" + (f"-phase{phase}" if cell == "gru_reset_before" else "")
        # No states, no bias, nothing beside it; or any strides, and sizes of 1.
        bare = arguments | dict.fromkeys(("gh", "b_ih", "b_hh", "h", "c", "dh", "dc"))
        ones = arguments | {f"{name}_unit": "i32" for name in operands} | {"B": 1, "H": 1}
        for kernel in (pointwise.forward, pointwise.backward):
            yield Variant(f"{name}-{kernel.__name__}", kernel, arguments, dots=False, wide=True)
            if dtype != torch.float32:
                yield Variant(f"{name}-{kernel.__name__}-bare", kernel, bare, dots=False, everywhere=False)
                yield Variant(f"{name}-{kernel.__name__}-ones", kernel, ones, dots=False, everywhere=False)
