"""The emulator's test kernels compile for devices too, and the wrappers of ptx.cuh become the instructions meant."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated import OUT, make

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")

# Instructions that the kernels of a file must contain on either architecture.
EVERYWHERE = {
    "warp": ["HMMA.16816.F32.BF16", "HMMA.16816.F32", "HMMA.1688.F32.TF32", "LDSM.16.M88.4", "LDSM.16.MT88.2"],
    "copy": ["LDGSTS", "LDGDEPBAR", "DEPBAR"],
    "block": ["BAR.SYNC", "BAR.ARV", "STG.E.128", "CS2R"],
    "grid": ["LDG.E.STRONG.GPU", "STG.E.STRONG.GPU", "ATOMG.E.ADD.STRONG.GPU", "MEMBAR", "NANOSLEEP"],
    "cluster": [],
    "exit": [],
    "scan": [],
    "tensor": [],
    "wgmma": [],
}
# Wrappers of Hopper's instructions trap on sm_80, and what would follow is left out.
HOPPER = {
    "cluster": ["UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS", "STAS", "UBLKCP.S.S", "UBLKCP.S.G", "FENCE.VIEW.ASYNC"],
    "exit": ["UCGABAR_ARV", "UBLKCP.S.S", "STAS"],
    "scan": ["HMMA.16816.F32.BF16", "LDSM.16.M88.2", "UCGABAR_ARV"],
    "wgmma": [
        "HGMMA.64x64x16.F32.BF16",
        "HGMMA.64x64x16.F32",
        "HGMMA.64x256x16.F32.BF16",
        "WARPGROUP.ARRIVE",
        "WARPGROUP.DEPBAR",
        "USETMAXREG.DEALLOC",
        "USETMAXREG.TRY_ALLOC",
    ],
    "tensor": [f"{name}.{rank}D" for name in ("UTMALDG", "UTMASTG") for rank in (2, 3, 4, 5)]
    + ["UTMACMDFLUSH", "UTMACCTL.PF"],
}


def disassembler() -> Path | None:
    """The one that Triton's package carries, or an installed one."""
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "nvdisasm"
        if path.exists():
            return path
    found = shutil.which("nvdisasm")
    return Path(found) if found else None


@pytest.fixture(scope="module", autouse=True)
def _cubins():
    make("device")


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("name", sorted(EVERYWHERE))
def test_instructions(name, arch):
    tool = disassembler()
    if tool is None:
        pytest.skip("neither triton nor the CUDA toolkit brings nvdisasm")
    cubin = OUT / f"sm_{arch}" / f"{name}.cubin"
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.x]+)", text))
    wanted = EVERYWHERE[name] + (HOPPER.get(name, []) if arch == "90a" else [])
    missing = [w for w in wanted if not any(f == w or f.startswith(w + ".") for f in found)]
    assert found and not missing, f"{missing} not among {sorted(found)}"
