"""Every row of the core's ISA table, not only the best that this machine would choose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fusedseq
from fusedseq import registry
from fusedseq.ops import scan
from fusedseq.testing import DTYPES, Case, check, evaluate, make_inputs
from fusedseq.testing.cases import CELLS, compact_cases

try:
    from fusedseq import _cpu
except ImportError:
    _cpu = None

ISAS = () if _cpu is None else tuple(_cpu.isas())
KNOWN = ("baseline", "avx2", "avx512", "avx512bf16")


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def skip_if_missing() -> None:
    reason = registry.backends()["cpu"].missing() if "cpu" in registry.backends() else "no such backend"
    if reason is not None:
        pytest.skip(f"cpu: {reason}")


def test_the_table_is_walked() -> None:
    skip_if_missing()
    assert ISAS and ISAS[0] == "baseline"
    assert list(ISAS) == [name for name in KNOWN if name in ISAS]
    before = _cpu.isa()
    assert before in ISAS
    with pytest.raises((ValueError, RuntimeError)):
        _cpu.set_isa("no such isa")
    assert _cpu.isa() == before


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_parity_on_isa(isa: str, cell: str, dtype: torch.dtype) -> None:
    assert _cpu.isa() == isa
    with fusedseq.use_backend("cpu"), registry.record() as choices:
        for case in [*compact_cases(cell), Case.parse(cell, "T3B9I11H130-bi")]:
            check(scan, case, dtype)
    assert {choice.backend for choice in choices} == {"cpu"}


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_are_independent_on_isa(isa: str, cell: str) -> None:
    """The widest vectors have the most ways to treat the last rows of a batch differently from the first."""
    inputs = make_inputs(Case.parse(cell, "T4B19I5H35-bi"), torch.float32)
    with fusedseq.use_backend("cpu"):
        together = evaluate(scan, inputs)
        for B in (1, 2, 7, 18):
            part = make_inputs(inputs.case, torch.float32)
            part.x = inputs.x[:, :B]
            part.h0 = inputs.h0[:, :B]
            part.c0 = None if inputs.c0 is None else inputs.c0[:, :B]
            part.upstream = {name: g[:, :B] for name, g in inputs.upstream.items()}
            for name, t in evaluate(scan, part).items():
                if not name.startswith(("dw", "db")):
                    assert torch.equal(t, together[name][:, :B]), f"{name} of {B} of 19 rows"
