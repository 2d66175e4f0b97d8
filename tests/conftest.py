"""What every test runs under: poisoned uninitialised memory, two threads, and a record of what truly ran."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from emulated import Cases
from pairs import covering

try:
    from hypothesis import settings
except ImportError:  # a bare machine with a GPU runs the parity tests alone (`make device`)
    settings = None

# Before anything imports triton. Where there is a GPU its kernels are compiled and run there, else interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A change lands or not by the same draws each time; `--hypothesis-profile default` looks further.
if settings is not None:
    settings.register_profile("fixed", derandomize=True, database=None)
    settings.load_profile("fixed")

# (cell, backend, dtype) of every parity check that passed on the backend that it named.
Ran = set[tuple[str, str, torch.dtype]]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: runs after every other test")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pairs", action="store_true", help="of the rows for Triton's kernels only those of tests/pairs.py"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--pairs"):
        rows = {item.nodeid for item in items if re.search(r"\[triton-|test_triton_cells.*\[", item.nodeid)}
        left_out = {one for one in rows if "-f64-" not in one}  # Triton refuses those at once
        left_out -= covering(left_out)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
        items[:] = [item for item in items if item.nodeid not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A kernel that fails takes the process's CUDA context with it, and every later test of the process: a process
    among several, which the others' do not need, ends then, and another is started in its place."""
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid}\n{report.longreprtext}\nthe CUDA context is lost: {error}", file=sys.__stderr__)
            os._exit(3)
    return report


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that whoever reads before writing is found out."""
    # Only warn: on a GPU some of torch's own operations, which serve as peers, have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().item()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """float32 is judged by float32's rule, so recurrent layers on a GPU keep all digits where a test says nothing."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def ran() -> Ran:
    return set()


@pytest.fixture(scope="session")
def cases() -> Cases:
    """The emulator's own test kernels."""
    return Cases()


@pytest.fixture(scope="session")
def _stand_in(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from stand_in import build  # not before TRITON_INTERPRET is set

    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def stand_in(_stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA backend calls the vendor's library itself, for weights of any number, and a stand-in answers."""
    from fusedseq import config
    from fusedseq.backends import cuda_products

    monkeypatch.setattr(config, "settings", dataclasses.replace(config.settings, cuda_products="direct"))
    monkeypatch.setattr(cuda_products, "DIRECTLY", 0)
    monkeypatch.setattr(cuda_products, "LIBRARY_WORKSPACE", 2**20)  # all of it is filled with NaN each time
    return _stand_in
