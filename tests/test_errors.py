"""Everything a caller can get wrong: which error it is, and that it names the argument, the expected and the given."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fusedseq import ops, registry
from fusedseq.ops import ArgumentTypeError, ArgumentValueError

T, B, I, H = 4, 3, 2, 5


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def weights(gates: int = 4, bias: bool = True, proj: int = 0, **kind: Any) -> list[torch.Tensor]:
    shapes: list[tuple[int, ...]] = [(gates * H, I), (gates * H, proj or H)]
    shapes += [(gates * H,), (gates * H,)] if bias else []
    shapes += [(proj, H)] if proj else []
    return [zeros(*shape, **kind) for shape in shapes]


def changed(index: int, value: Any, **options: Any) -> list[Any]:
    out: list[Any] = weights(**options)
    out[index] = value
    return out


GOOD: dict[str, Any] = {"cell": "lstm", "x": zeros(T, B, I), "h0": None, "c0": None, "weights": weights()}
PACKED = {"x": zeros(6, I), "batch_sizes": torch.tensor([3, 2, 1])}
GRU = {"cell": "gru", "weights": weights(3)}


class Bad(NamedTuple):
    change: dict[str, Any]
    error: type[Exception]
    message: str


VALUES = {
    "cell": Bad({"cell": "ltsm"}, ArgumentValueError, r"cell: expected one of lstm, gru, .*, got 'ltsm'"),
    "x-2d": Bad({"x": zeros(T, I)}, ArgumentValueError, r"x: expected 3 dimensions \[T, B, I\], got 2: \[4, 2\]"),
    "x-2d-bf": Bad({"x": zeros(T, I), "batch_first": True}, ArgumentValueError, r"x: .*\[B, T, I\], got 2: \[4, 2\]"),
    "x-4d": Bad({"x": zeros(1, T, B, I)}, ArgumentValueError, r"x: expected 3 dimensions .*, got 4: \[1, 4, 3, 2\]"),
    "x-size": Bad(
        {"x": zeros(T, B, 7)}, ArgumentValueError, r"weights\[0\] \(w_ih\): expected shape \[20, 7\], got \[20, 2\]"
    ),
    "x-packed-3d": Bad(
        {**PACKED, "x": zeros(T, B, I)}, ArgumentValueError, r"x: expected 2 dimensions \[N, I\].*, got 3: \[4, 3, 2\]"
    ),
    "h0-batch": Bad({"h0": zeros(1, 9, H)}, ArgumentValueError, r"h0: expected shape \[1, 3, 5\], got \[1, 9, 5\]"),
    "h0-size": Bad({"h0": zeros(1, B, 6)}, ArgumentValueError, r"h0: expected shape \[1, 3, 5\], got \[1, 3, 6\]"),
    "h0-2d": Bad({"h0": zeros(B, H)}, ArgumentValueError, r"h0: expected shape \[1, 3, 5\], got \[3, 5\]"),
    "h0-directions": Bad(
        {"h0": zeros(2, B, H)}, ArgumentValueError, r"h0: expected shape \[1, 3, 5\], got \[2, 3, 5\]"
    ),
    "h0-proj": Bad(
        {"h0": zeros(1, B, H), "weights": weights(proj=2)},
        ArgumentValueError,
        r"h0: expected shape \[1, 3, 2\], got \[1, 3, 5\]",
    ),
    "h0-packed": Bad({**PACKED, "h0": zeros(1, 2, H)}, ArgumentValueError, r"h0: expected a batch of 3.*, got 2"),
    "h0-packed-2d": Bad(
        {**PACKED, "h0": zeros(3, H)}, ArgumentValueError, r"h0: expected shape \[1, 3, 5\], got \[3, 5\]"
    ),
    "c0-size": Bad({"c0": zeros(1, B, 6)}, ArgumentValueError, r"c0: expected shape \[1, 3, 5\], got \[1, 3, 6\]"),
    "c0-gru": Bad(
        {**GRU, "c0": zeros(1, B, H)}, ArgumentValueError, r"c0: expected None for 'gru'.*, got a tensor \[1, 3, 5\]"
    ),
    "cells-gru": Bad({**GRU, "cells": True}, ArgumentValueError, r"cells: expected False for 'gru'.*, got True"),
    "weights-none": Bad(
        {"weights": []}, ArgumentValueError, r"weights: expected 2, 3, 4 or 5 tensors for 'lstm'.*, got 0"
    ),
    "weights-count": Bad({"weights": weights() * 2}, ArgumentValueError, r"weights: expected 2, 3, 4 or 5 .*, got 8"),
    "weights-bi": Bad(
        {"bidirectional": True},
        ArgumentValueError,
        r"weights\[1\] \(w_hh\): expected .*, got \[20, 5\]|weights\[2\].*got \[20\]",
    ),
    "weights-bi-count": Bad(
        {"bidirectional": True, "weights": weights()[:3]},
        ArgumentValueError,
        r"weights: expected 4, 6, 8 or 10 .*, got 3",
    ),
    "weights-gru-count": Bad(
        {**GRU, "weights": weights(3)[:1]}, ArgumentValueError, r"weights: expected 2 or 4 .*'gru'.*, got 1"
    ),
    "projection-gru": Bad(
        {**GRU, "weights": weights(3, proj=2)},
        ArgumentValueError,
        r"weights: expected 2 or 4 tensors for 'gru': .*projection.*, got 5",
    ),
    "w_ih": Bad(
        {"weights": changed(0, zeros(20, 3))},
        ArgumentValueError,
        r"weights\[0\] \(w_ih\): expected shape \[20, 2\], got \[20, 3\]",
    ),
    "w_hh": Bad(
        {"weights": changed(1, zeros(20, 4))},
        ArgumentValueError,
        r"weights\[1\] \(w_hh\): expected \[20, 5\], got \[20, 4\]",
    ),
    "w_hh-gates": Bad(
        {"weights": changed(1, zeros(21, 5))},
        ArgumentValueError,
        r"weights\[1\] \(w_hh\): .*\[4\*H, R\], got \[21, 5\]",
    ),
    "w_hh-1d": Bad(
        {"weights": changed(1, zeros(20))},
        ArgumentValueError,
        r"weights\[1\] \(w_hh\): expected 2 dimensions.*, got \[20\]",
    ),
    "b_hh": Bad(
        {"weights": changed(3, zeros(19))},
        ArgumentValueError,
        r"weights\[3\] \(b_hh\): expected shape \[20\], got \[19\]",
    ),
    "w_hr": Bad(
        {"weights": changed(4, zeros(3, H), proj=2)},
        ArgumentValueError,
        r"weights\[4\] \(w_hr\): expected shape \[2, 5\], got \[3, 5\]",
    ),
    "w_ih-reverse": Bad(
        {"bidirectional": True, "weights": weights() + changed(0, zeros(20, 3))},
        ArgumentValueError,
        r"weights\[4\] \(w_ih\): expected shape \[20, 2\], got \[20, 3\]",
    ),
    "lengths-negative": Bad(
        {"lengths": torch.tensor([1, -2, 3])}, ArgumentValueError, r"lengths: expected no negative entry, got -2"
    ),
    "lengths-long": Bad(
        {"lengths": torch.tensor([1, 5, 3])}, ArgumentValueError, r"lengths: expected entries of at most T = 4, got 5"
    ),
    "lengths-shape": Bad(
        {"lengths": torch.tensor([1, 2])}, ArgumentValueError, r"lengths: expected shape \[3\], got \[2\]"
    ),
    "lengths-2d": Bad(
        {"lengths": torch.ones(3, 1).long()}, ArgumentValueError, r"lengths: expected shape \[3\], got \[3, 1\]"
    ),
    "lengths-packed": Bad(
        {**PACKED, "lengths": torch.tensor([1, 2, 3])},
        ArgumentValueError,
        r"lengths: expected None together with batch_sizes.*, got a tensor",
    ),
    "batch_sizes-rising": Bad(
        {**PACKED, "batch_sizes": torch.tensor([2, 3, 1])},
        ArgumentValueError,
        r"batch_sizes: expected non-increasing entries, got \[2, 3, 1\]",
    ),
    "batch_sizes-zero": Bad(
        {**PACKED, "batch_sizes": torch.tensor([4, 2, 0])},
        ArgumentValueError,
        r"batch_sizes: expected positive entries, got 0",
    ),
    "batch_sizes-sum": Bad(
        {**PACKED, "batch_sizes": torch.tensor([3, 2, 2])},
        ArgumentValueError,
        r"batch_sizes: expected a sum of 6.*, got 7",
    ),
    "batch_sizes-empty": Bad(
        {**PACKED, "batch_sizes": torch.tensor([], dtype=torch.int64)},
        ArgumentValueError,
        r"batch_sizes: expected a sum of 6.*, got 0",
    ),
    "batch_sizes-2d": Bad(
        {**PACKED, "batch_sizes": torch.ones(6, 1).long()},
        ArgumentValueError,
        r"batch_sizes: expected 1 dimension \[T\], got 2: \[6, 1\]",
    ),
    "resets-shape": Bad(
        {"resets": torch.zeros(B, T).bool()}, ArgumentValueError, r"resets: expected shape \[4, 3\].*, got \[3, 4\]"
    ),
    "resets-packed": Bad(
        {**PACKED, "resets": torch.zeros(5).bool()}, ArgumentValueError, r"resets: expected shape \[6\].*, got \[5\]"
    ),
}

TYPES = {
    "x-list": Bad({"x": [[1.0]]}, ArgumentTypeError, r"x: expected a tensor, got list"),
    "x-none": Bad({"x": None}, ArgumentTypeError, r"x: expected a tensor, got NoneType"),
    "x-int": Bad({"x": zeros(T, B, I).long()}, ArgumentTypeError, r"x: expected dtype float32, .*, got torch.int64"),
    "x-complex": Bad(
        {"x": zeros(T, B, I).cfloat()}, ArgumentTypeError, r"x: expected dtype float32, .*, got torch.complex64"
    ),
    "x-double": Bad(
        {"x": zeros(T, B, I).double()},
        ArgumentTypeError,
        r"weights\[0\] \(w_ih\): expected dtype torch.float64.*, got torch.float32",
    ),
    "h0-dtype": Bad(
        {"h0": zeros(1, B, H).double()}, ArgumentTypeError, r"h0: expected dtype torch.float32.*, got torch.float64"
    ),
    "h0-tuple": Bad({"h0": (zeros(1, B, H),)}, ArgumentTypeError, r"h0: expected a tensor or None, got tuple"),
    "h0-device": Bad({"h0": zeros(1, B, H, device="meta")}, ArgumentTypeError, r"h0: expected device cpu.*, got meta"),
    "c0-dtype": Bad(
        {"c0": zeros(1, B, H).half()}, ArgumentTypeError, r"c0: expected dtype torch.float32.*, got torch.float16"
    ),
    "weights-tensor": Bad(
        {"weights": zeros(4, 20)}, ArgumentTypeError, r"weights: expected a list of tensors, got Tensor"
    ),
    "weights-none": Bad(
        {"weights": changed(2, None)}, ArgumentTypeError, r"weights\[2\]: expected a tensor, got NoneType"
    ),
    "weights-dtype": Bad(
        {"weights": changed(1, zeros(20, H).bfloat16())},
        ArgumentTypeError,
        r"weights\[1\] \(w_hh\): .*torch.float32.*, got torch.bfloat16",
    ),
    "weights-device": Bad(
        {"weights": changed(3, zeros(20, device="meta"))},
        ArgumentTypeError,
        r"weights\[3\] \(b_hh\): expected device cpu.*, got meta",
    ),
    "x-device": Bad(
        {"x": zeros(T, B, I, device="meta")},
        ArgumentTypeError,
        r"weights\[0\] \(w_ih\): expected device meta.*, got cpu",
    ),
    "lengths-list": Bad({"lengths": [1, 2, 3]}, ArgumentTypeError, r"lengths: expected a tensor or None, got list"),
    "lengths-float": Bad(
        {"lengths": torch.ones(3)}, ArgumentTypeError, r"lengths: expected dtype torch.int64, got torch.float32"
    ),
    "batch_sizes-float": Bad(
        {**PACKED, "batch_sizes": torch.tensor([3.0, 2.0, 1.0])},
        ArgumentTypeError,
        r"batch_sizes: expected dtype torch.int64, got torch.float32",
    ),
    "batch_sizes-list": Bad(
        {**PACKED, "batch_sizes": [3, 2, 1]}, ArgumentTypeError, r"batch_sizes: expected a tensor or None, got list"
    ),
    "resets-dtype": Bad(
        {"resets": zeros(T, B)}, ArgumentTypeError, r"resets: expected dtype torch.bool, got torch.float32"
    ),
    "resets-device": Bad(
        {"resets": torch.zeros(T, B, dtype=torch.bool, device="meta")},
        ArgumentTypeError,
        r"resets: expected device cpu.*, got meta",
    ),
}


class Watch(TorchFunctionMode):
    """Changes nothing, but being there makes a call go through the operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def scan(change: dict[str, Any]) -> None:
    arguments = {**GOOD, **change}
    first = [arguments.pop(name) for name in ("cell", "x", "h0", "c0", "weights")]
    ops.scan(*first, **arguments)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=name) for name, bad in {**VALUES, **TYPES}.items()])
@pytest.mark.parametrize("watched", [False, True], ids=["thin", "operator"])
def test_scan(bad: Bad, watched: bool) -> None:
    with registry.record() as ran:
        if watched:
            # Some of these reach a fake or a real implementation of the operator, with tensors on the meta device.
            with Watch(), pytest.raises(bad.error, match=f"^{bad.message}"):
                scan(bad.change)
        else:
            with pytest.raises(bad.error, match=f"^({bad.message})$") as caught:
                scan(bad.change)
            assert caught.type is bad.error
    assert ran == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cell": "lst"}, ArgumentValueError, r"cell: expected one of lstm, .*, got 'lst'"),
        ({"x": zeros(1, B, I)}, ArgumentValueError, r"x: expected 2 dimensions \[B, I\], got 3: \[1, 3, 2\]"),
        ({"x": zeros(I)}, ArgumentValueError, r"x: expected 2 dimensions \[B, I\], got 1: \[2\]"),
        ({"x": 1.0}, ArgumentTypeError, r"x: expected a tensor, got float"),
        ({"h": zeros(1, B, H)}, ArgumentValueError, r"h: expected shape \[3, 5\], got \[1, 3, 5\]"),
        ({"h": zeros(B, 6)}, ArgumentValueError, r"h: expected shape \[3, 5\], got \[3, 6\]"),
        ({"h": zeros(2, H)}, ArgumentValueError, r"h: expected shape \[3, 5\], got \[2, 5\]"),
        ({"h": "state"}, ArgumentTypeError, r"h: expected a tensor or None, got str"),
        ({"c": zeros(B, H).double()}, ArgumentTypeError, r"c: expected dtype torch.float32.*, got torch.float64"),
        ({"cell": "gru", "weights": weights(3), "c": zeros(B, H)}, ArgumentValueError, r"c: expected None for 'gru'.*"),
        ({"weights": weights()[:1]}, ArgumentValueError, r"weights: expected 2, 3, 4 or 5 tensors .*, got 1"),
    ],
)
def test_cell(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"cell": "lstm", "x": zeros(B, I), "h": None, "c": None, "weights": weights(), **change}
    with pytest.raises(error, match=f"^{message}$"):
        ops.cell(**arguments)


def test_the_unchanged_call_is_right() -> None:
    scan({})
    scan(PACKED)
    scan(GRU)
    scan({"weights": tuple(weights())})
    scan({"weights": weights(proj=2), "h0": zeros(1, B, 2), "c0": zeros(1, B, H), "cells": True})
    scan({"x": zeros(0, B, I), "lengths": torch.zeros(B, dtype=torch.int64)})
    scan({"x": zeros(T, 0, I), "lengths": torch.zeros(0, dtype=torch.int64)})


def test_errors_are_those_that_torch_users_catch() -> None:
    assert issubclass(ArgumentValueError, ValueError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(ArgumentValueError, RuntimeError)
    assert issubclass(ArgumentTypeError, RuntimeError)


def test_compiled_calls_are_checked_too() -> None:
    compiled = torch.compile(ops.scan, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"h0: expected shape \[1, 3, 5\], got \[1, 3, 6\]"):
        compiled("lstm", GOOD["x"], zeros(1, B, 6), None, GOOD["weights"])
    with pytest.raises(ArgumentValueError, match="lengths: expected entries of at most T = 4, got 9"):
        compiled("lstm", GOOD["x"], None, None, GOOD["weights"], lengths=torch.tensor([1, 9, 1]))
