"""The rows that `--pairs` keeps: no pair of words is lost, and few rows are left."""

from __future__ import annotations

from itertools import combinations

from pairs import covering, words

from fusedseq.testing import DTYPES
from fusedseq.testing.cases import CELLS, cases


def test_words_are_of_the_function_and_of_the_classes_of_sizes() -> None:
    assert words("f.py::g") == ["f.py::g"]
    assert words("f.py::g[triton-lstm-T1B37I3H65-bi]") == ["f.py::g", "triton", "lstm", "T1", "H<3", "bi"]
    assert words("f.py::g[B2H4K2L70S140E40V72-left30]") == ["f.py::g", "E<2", "V<1", "left30"]


def test_every_pair_is_kept_by_few_rows() -> None:
    rows = [f"f[{case.id(dtype)}]" for cell in CELLS for dtype in DTYPES.values() for case in cases(cell, dtype)]
    kept = covering(rows)
    assert kept <= set(rows) and len(kept) < len(rows) / 3
    assert kept == covering(reversed(rows))

    def pairs(ids: set[str]) -> set[tuple[str, ...]]:
        return {tuple(sorted(pair)) for one in ids for pair in combinations(words(one), 2)}

    assert pairs(kept) == pairs(set(rows))
