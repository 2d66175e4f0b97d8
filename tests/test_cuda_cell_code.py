"""What nvcc makes of the pointwise kernels and of the barrier loops: nothing spilled, whole accesses and no others in
the wide kernels, no call within them, and in each loop the instructions that it is to time."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cuda_resources import disassembler

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
CELL_VARIANTS = 2 * 4 * 4 * 2  # passes, cells, dtypes, wide or not
LOOPS = {
    "BlockBarrier": (["BAR.SYNC"], ["80", "90a"]),
    "ClusterBarrier": (["UCGABAR_ARV", "UCGABAR_WAIT"], ["90a"]),
    "Exchange<fusedseq::device::ClusterChannel>": (["UBLKCP.S.S", "SYNCS", "BAR.SYNC"], ["90a"]),
    "WarpExchange<4>": (["STAS.128", "SYNCS"], ["90a"]),
    "WarpExchange<8>": (["STAS.128", "SYNCS"], ["90a"]),
    "FlagBarrier": (["LDG.E.STRONG.GPU", "STG.E.STRONG.GPU"], ["80", "90a"]),
    "Exchange<fusedseq::device::GridChannel>": (["LDG.E.STRONG.GPU", "STG.E.STRONG.GPU", "BAR.SYNC"], ["80", "90a"]),
    "GridBarrier": (["LDG.E.STRONG.GPU", "ADD.STRONG.GPU", "BAR.SYNC"], ["80", "90a"]),
}


def compiled(name: str, arch: str, folder: Path) -> dict[str, list[str]]:
    """The instructions of each kernel of a file, none of which may spill."""
    cubin = folder / f"{name}_{arch}.cubin"
    command = [
        "nvcc", "-std=c++17", "-O3", "-Icsrc", "-DFSQ_ISA=device", f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Xptxas", "-v", "-cubin", f"csrc/cuda/{name}.cu", "-o", str(cubin),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stdout + done.stderr)
    assert spills and set(spills) == {("0", "0")}
    text = subprocess.run([disassembler(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    found = {}
    for kernel in text.split("Function :")[1:]:
        title, code = kernel.split("\n", 1)
        found[title.strip()] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.]+)", code)
    return found


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_wide_kernels_move_whole_pieces_with_every_access(arch: str, tmp_path: Path) -> None:
    kernels = compiled("pointwise", arch, tmp_path)
    assert len(kernels) == CELL_VARIANTS
    for title, instructions in kernels.items():
        wide = re.search(r", 1>\(", title) is None
        accesses = {one for one in instructions if one.startswith(("LDG", "STG"))}
        assert {one.split(".")[0] for one in accesses} == {"LDG", "STG"}, title
        # Four units of a half type, going forward, are 8 bytes; of all else there are 16.
        halves = "cell_forward" in title and ("half" in title or "bfloat16" in title)
        sizes = {size for one in accesses for size in re.findall(r"\.(64|128)\b", one)}
        if wide:
            assert all(re.search(r"\.(64|128)\b", one) for one in accesses), f"{title}: {accesses}"
            assert sizes == ({"64", "128"} if halves else {"128"}), f"{title}: {accesses}"
            # A division of float32 that minds every case is one.
            assert "double" in title or not any(one.startswith("CALL") for one in instructions), title
        else:
            assert "128" not in sizes, f"{title}: {accesses}"
        assert not any(one.startswith(("LDL", "STL", "RED", "ATOM")) for one in instructions), title


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_barrier_loops_time_what_they_are_about(arch: str, tmp_path: Path) -> None:
    kernels = compiled("barrier_costs", arch, tmp_path)
    assert len(kernels) == 2 * len(LOOPS)
    for name, (wanted, archs) in LOOPS.items():
        mine = [code for title, code in kernels.items() if re.search(rf"(::|<)({re.escape(name)})[,>]", title)]
        assert len(mine) == 2, f"{name}: {list(kernels)}"
        for code in mine:
            if arch not in archs:
                assert "BPT.TRAP" in code  # a launcher never chooses it
                continue
            assert any(one.startswith(("CS2R", "S2UR", "S2R")) for one in code)
            for instruction in wanted:
                assert any(instruction in one for one in code), f"{name}: no {instruction} among {sorted(set(code))}"
