"""What nvcc makes of the Hopper kernel: nothing spilled, products that overlap, the instructions that it is about."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cuda_resources import disassembler

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
VARIANTS = 2 * 2  # dtypes, head sizes


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """ptxas's report and the cubin."""
    cubin = tmp_path_factory.mktemp("hopper") / "attention_hopper.cubin"
    command = [
        "nvcc", "-std=c++17", "-O3", "-Icsrc", "-DFSQ_ISA=device", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas",
        "-v", "-cubin", "csrc/cuda/attention_hopper.cu", "-o", str(cubin),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, cubin


def test_registers(compiled: tuple[str, Path]) -> None:
    report, _ = compiled
    assert "Potential Performance Loss" not in report and "setmaxnreg" not in report, report
    assert re.findall(r"Used (\d+) registers", report) == ["168"] * VARIANTS  # what 384 threads begin with
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", report) == [("0", "0")] * VARIANTS


def test_instructions(compiled: tuple[str, Path]) -> None:
    text = subprocess.run([disassembler(), "-sass", compiled[1]], capture_output=True, text=True, check=True).stdout
    kernels = text.split("Function :")[1:]
    assert len(kernels) == VARIANTS
    for kernel in kernels:
        name, code = kernel.split("\n", 1)
        width = 64 if "Li64E" in name else 128
        # The consumers' registers, 232; the producer's, 40.
        assert "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8" in code and "USETMAXREG.DEALLOC.CTAPOOL 0x28" in code
        used = max(int(number) for number in re.findall(r"\bR(\d+)\b", code))
        assert used < 232
        assert code.count("UTMALDG.4D") >= 3 * width // 64  # Q, K, V in panels of 64 columns
        values = re.findall(rf"HGMMA\.64x{width}x16\.F32\S* R\d+, R\d+, gdesc\[\w+\]\.tnspB", code)
        assert len(values) == 2 * 128 // 16  # weights in registers; in the loop and after it
        scores = re.findall(r"HGMMA\.64x128x16\.F32\S* R\d+, gdesc\[\w+\], R", code)
        assert len(scores) == 2 * width // 16
        # Softmax begins when the scores are there and the values' product is not.
        assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1 ", code)) == 1
