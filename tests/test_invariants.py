"""What holds bit by bit: results depend on a row's own data, and on neither batch, threads, layout nor chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fusedseq
from fusedseq import registry
from fusedseq.ops import scan
from fusedseq.testing import DTYPES, Case, Inputs, evaluate, make_inputs
from fusedseq.testing.cases import CELLS

BACKENDS = tuple(registry.backends())
# The outputs and gradients that belong to one row of the batch, unlike the gradients of the weights.
ROW_WISE = ("y", "h_n", "c_n", "c_all", "dx", "dh0", "dc0")

pytestmark = [
    pytest.mark.parametrize("cell", CELLS),
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES),
]


def inputs_for(backend: str, cell: str, text: str, dtype: torch.dtype) -> Inputs:
    case = Case.parse(cell, text)
    module = registry.backends()[backend]
    call = registry.ScanCall(
        cell=cell, device="cpu", dtype=dtype, T=case.T, B=case.B, I=case.I, H=case.H, R=case.R, D=case.D,
        packed=case.layout == "packed", lengths=case.layout.startswith("lengths"), resets=case.resets,
        cells=case.cells, grad=True,
    )  # fmt: skip
    reason = module.missing() or module.supports(call)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if backend == "triton" and dtype != torch.float32 and not torch.cuda.is_available():
        pytest.skip("triton: interpreted, one dtype has to do")
    return make_inputs(case, dtype)


def run(backend: str, inputs: Inputs) -> dict[str, Tensor]:
    with fusedseq.use_backend(backend):
        return evaluate(scan, inputs)


def assert_bitwise(got: dict[str, Tensor], want: dict[str, Tensor], names: tuple[str, ...] | None = None) -> None:
    for name in want if names is None else [name for name in names if name in want]:
        assert want[name].isfinite().all(), f"{name} is not finite"
        assert torch.equal(got[name], want[name]), (
            f"{name} differs by {(got[name] - want[name]).abs().max().item():.1e}"
        )


def skip_vendor_products(backend: str) -> None:
    if backend in ("reference", "triton"):
        pytest.skip(f"{backend}: its products are the vendor library's, whose rounding depends on the number of rows")


def one_row(inputs: Inputs, b: int, length: int | None = None) -> Inputs:
    """Row b of a dense or padded time-major problem as a problem of its own, cut to `length` steps."""

    def of_sequence(t: Tensor) -> Tensor:
        return t[:length, b : b + 1]

    def of_state(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:, b : b + 1]

    return replace(
        inputs,
        x=of_sequence(inputs.x),
        h0=of_state(inputs.h0),
        c0=of_state(inputs.c0),
        lengths=None if inputs.lengths is None or length is not None else inputs.lengths[b : b + 1],
        resets=None if inputs.resets is None else of_sequence(inputs.resets),
        upstream={
            name: of_sequence(g) if name in ("y", "c_all") else of_state(g) for name, g in inputs.upstream.items()
        },
    )


def row_of(outcome: dict[str, Tensor], b: int, length: int | None = None) -> dict[str, Tensor]:
    rows = {name: outcome[name][:, b : b + 1] for name in ROW_WISE if name in outcome}
    return {name: t[:length] if name in ("y", "c_all", "dx") else t for name, t in rows.items()}


def test_two_runs_are_equal(backend: str, cell: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(backend, cell, "T9B13I7H50-bi-lengths0-resets-cells", dtype)
    assert_bitwise(run(backend, inputs), run(backend, inputs))


# Single steps have products of their own.
@pytest.mark.parametrize(
    "text", ["T5B37I6H41-bi-cells", "T5B37I6H32-lengths0-resets-proj12", "T1B37I70H41-bi", "T1B37I6H35-resets-proj12"]
)
def test_a_row_does_not_depend_on_its_batch(backend: str, cell: str, dtype: torch.dtype, text: str) -> None:
    skip_vendor_products(backend)
    inputs = inputs_for(backend, cell, text, dtype)
    together = run(backend, inputs)
    for b in (0, 1, 17, 35, 36):
        assert_bitwise(run(backend, one_row(inputs, b)), row_of(together, b), ROW_WISE)


def test_thread_count_does_not_matter(backend: str, cell: str, dtype: torch.dtype) -> None:
    skip_vendor_products(backend)
    # The last is gathered in several chunks, by threads that share no units and so seldom wait for each other.
    texts = (
        "T6B11I9H67-bi-cells", "T6B1I9H130", "T7B6I5H20-packed-proj9", "T3B30I9H160-bi-lengths", "T1B19I40H130-bi",
        "T24B64I8H128-bf",
    )  # fmt: skip
    for text in texts:
        inputs = inputs_for(backend, cell, text, dtype)
        two = run(backend, inputs)
        for threads in (1, 3, 5):  # odd counts give the two directions groups of unequal size
            torch.set_num_threads(threads)
            try:
                other = run(backend, inputs)
            finally:
                torch.set_num_threads(2)
            assert_bitwise(other, two)


def sorted_padded_and_packed(backend: str, cell: str, dtype: torch.dtype) -> tuple[Inputs, Inputs, Tensor]:
    """One problem in both layouts, rows in descending length; also which positions of the grid are live."""
    padded = inputs_for(backend, cell, "T8B7I5H21-bi-lengths-resets-cells", dtype)
    lengths = torch.tensor([8, 8, 6, 5, 5, 2, 1])
    live = torch.arange(8).unsqueeze(1) < lengths
    padded = replace(padded, lengths=lengths)
    packed = replace(
        padded,
        x=padded.x[live],
        lengths=None,
        batch_sizes=live.sum(1),
        resets=padded.resets[live],
        upstream={name: g[live] if name in ("y", "c_all") else g for name, g in padded.upstream.items()},
    )
    return padded, packed, live


def test_padded_equals_packed(backend: str, cell: str, dtype: torch.dtype) -> None:
    if backend == "triton":  # unlike the reference it multiplies packed rows as they are
        skip_vendor_products(backend)
    padded, packed, live = sorted_padded_and_packed(backend, cell, dtype)
    on_grid, in_rows = run(backend, padded), run(backend, packed)
    for name in ROW_WISE:
        if name in on_grid and name in ("y", "c_all", "dx"):
            assert not on_grid[name][~live].any(), f"{name} is not zero beyond the end of a row"
            on_grid[name] = on_grid[name][live]
    assert_bitwise(in_rows, {name: on_grid[name] for name in ROW_WISE if name in on_grid})
    for name in set(on_grid) - set(ROW_WISE):
        eps = torch.finfo(dtype).eps
        error = (in_rows[name].double() - on_grid[name].double()).norm() / on_grid[name].double().norm()
        assert error <= 4 * eps, f"{name}: {error:.1e}"


def test_a_padded_row_equals_the_row_alone(backend: str, cell: str, dtype: torch.dtype) -> None:
    skip_vendor_products(backend)
    padded, _, _ = sorted_padded_and_packed(backend, cell, dtype)
    together = run(backend, padded)
    for b, length in enumerate(padded.lengths.tolist()):
        alone, row = run(backend, one_row(padded, b, length)), row_of(together, b, length)
        if length > 1:
            assert_bitwise(alone, row, ROW_WISE)
            continue
        # A scan of a single step reads the weights unpacked and sums in another order: equal up to rounding.
        for name in set(ROW_WISE) & set(row):
            torch.testing.assert_close(alone[name], row[name], rtol=0, atol=32 * torch.finfo(dtype).eps)


def test_padding_is_never_read(backend: str, cell: str, dtype: torch.dtype) -> None:
    """What lies beyond the end of a row, NaN included, reaches no output and no gradient, least of all a weight's."""
    inputs = inputs_for(backend, cell, "T7B5I4H18-bi-lengths0-resets-cells", dtype)
    beyond = torch.arange(7).unsqueeze(1) >= inputs.lengths
    clean, dirty = inputs.x.clone(), inputs.x.clone()
    clean[beyond], dirty[beyond] = 0.0, float("nan")
    upstream = {
        name: g.masked_fill(beyond.unsqueeze(2), float("nan")) if name in ("y", "c_all") else g
        for name, g in inputs.upstream.items()
    }
    want = run(backend, replace(inputs, x=clean))
    got = run(backend, replace(inputs, x=dirty, upstream=upstream))
    assert_bitwise(got, want)


def test_inputs_are_left_alone(backend: str, cell: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(backend, cell, "T5B6I7H17-bi-lengths0-resets-cells-sliced", dtype)
    before = [t.clone() for t in (inputs.x, inputs.h0, *inputs.weights, *inputs.upstream.values())]
    run(backend, inputs)
    after = [inputs.x, inputs.h0, *inputs.weights, *inputs.upstream.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
