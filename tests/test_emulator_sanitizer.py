"""AddressSanitizer follows the emulator's fibers and finds a kernel that leaves a tensor."""

import os
import subprocess
import sys

import pytest
from emulated import ROOT, make, missing_tools

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

OUT = ROOT / "build" / "emulator-asan"
# reverse's output lies in a block of memory of its own, of as many bytes as the command line says; a launch that fails
# leaves fibers behind, whose stacks the next launch takes.
PROGRAM = """
import ctypes, sys
library, libc = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
library.reverse_case.restype = ctypes.c_char_p
x, y = (ctypes.c_void_p(libc.malloc(ctypes.c_size_t(n))) for n in (512, int(sys.argv[2])))
for bug in (1, 0):
    print(bug, library.reverse_case(bug, x, y, 128).decode(), flush=True)
"""


@pytest.fixture(scope="module")
def runtime() -> str:
    path = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip("this g++ comes without libasan")
    make("emulated", OUT, EXTRA="-fsanitize=address -g -O0", KERNELS="tests/emulator/kernels/block.cu")
    return path


@pytest.mark.parametrize("size, found", [(512, False), (508, True)])
def test_a_store_past_a_tensor(runtime, size, found):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(OUT / "cases.so"), str(size)],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    if found:
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr and "block.cu" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("1 reverse (n=128): ") and done.stdout.endswith("\n0 \n")
