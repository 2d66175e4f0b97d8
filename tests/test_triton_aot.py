"""Every Triton kernel that ships, compiled for GPUs that are not here: no spills, room in shared memory, tensor cores.

`tests/data/triton_resources.json` is what they need; after a change that is meant to alter it:

    TRITON_INTERPRET=0 python -m fusedseq.kernels.aot --write tests/data/triton_resources.json
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusedseq import config, info
from fusedseq.__main__ import main

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

RECORD = Path(__file__).parent / "data" / "triton_resources.json"
RECORDED: dict[str, Any] = json.loads(RECORD.read_text())
ARCHITECTURES = [name for name in RECORDED if name.startswith("sm_")]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The variants that differ most, compiled in a process of its own, since this one may be interpreting.

    One without tensor cores that should have them fails there. Triton's cache spares what has not changed.
    """
    written = tmp_path_factory.mktemp("aot") / "resources.json"
    command = [sys.executable, "-m", "fusedseq.kernels.aot", "--part", "--write", str(written)]
    done = subprocess.run(command, env=config.compiling(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(written.read_text())


def test_the_record_is_of_every_variant(compiled: dict[str, Any]) -> None:
    assert list(SHARED) == ARCHITECTURES
    for architecture in ARCHITECTURES:
        assert compiled["names"][architecture] == list(RECORDED[architecture]), f"write {RECORD.name} again"
        assert compiled[architecture], architecture


def test_the_record_is_sound() -> None:
    for architecture, limit in SHARED.items():
        for name, (registers, spills, shared, _) in RECORDED[architecture].items():
            assert 0 < registers <= 255 and spills == 0 and shared <= limit, f"{architecture} {name}"


@pytest.mark.parametrize("architecture", SHARED)
def test_nothing_spills_and_all_fits(compiled: dict[str, Any], architecture: str) -> None:
    for name, (registers, spills, shared, _) in compiled[architecture].items():
        assert spills == 0, f"{name} keeps {spills} bytes of each thread in memory"
        assert 0 < registers <= 255, name
        assert shared <= SHARED[architecture], f"{name} needs {shared} bytes of shared memory"


@pytest.mark.parametrize("architecture", SHARED)
def test_products_are_where_they_were(compiled: dict[str, Any], architecture: str) -> None:
    for name, (*_, cores) in compiled[architecture].items():
        wanted = RECORDED[architecture][name][3]
        assert cores == wanted, f"{name} multiplies with {cores or 'no tensor core'}, recorded: {wanted or 'none'}"


def test_attention_fits_where_shared_memory_is_less() -> None:
    rows = RECORDED["sm_80"]
    small = {name: shared for name, (_, _, shared, _) in rows.items() if name.endswith("-99KB")}
    assert len(small) == 6
    for name, (_, _, shared, _) in rows.items():
        assert small.get(f"{name}-99KB", shared) <= 99 * 1024, name


def test_scans_of_many_rows_reach_wgmma() -> None:
    rows = {name: row for name, row in RECORDED["sm_90"].items() if "-64rows" in name}
    assert {name.split("-")[1] for name in rows} == {"resident", "streamed", "step"}
    assert {row[3] for row in rows.values()} == {"wgmma"}


@pytest.mark.parametrize("architecture", SHARED)
def test_registers_are_those_on_record(compiled: dict[str, Any], architecture: str) -> None:
    if compiled["triton"] != RECORDED["triton"]:
        pytest.skip(f"the record is of triton {RECORDED['triton']}, this is {compiled['triton']}")
    for name, (registers, _, shared, _) in compiled[architecture].items():
        recorded = RECORDED[architecture][name]
        assert [registers, shared] == [recorded[0], recorded[2]], (
            f"{name}: {registers} registers and {shared} bytes shared, recorded are {recorded[0]} and {recorded[2]}; "
            "if that is meant, write the record again"
        )


def test_the_command_compiles_and_does_not_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        ran.append((command[1:], env["TRITON_INTERPRET"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(info.subprocess, "run", run)
    assert main(["info", "--kernels"]) == 3
    assert ran == [(["-m", "fusedseq.kernels.aot"], "0")]


def test_the_table_is_readable() -> None:
    from fusedseq.kernels.aot import render

    text = render({name: RECORDED[name] for name in SHARED}).splitlines()
    assert len(text) == sum(len(RECORDED[name]) + 1 for name in SHARED)
    assert text[0].split() == ["sm_80", "registers", "spills", "shared", "tensor", "cores"]
    name, row = next(iter(RECORDED["sm_80"].items()))
    assert text[1].split() == [name, *map(str, row[:3]), row[3] or "-"]
