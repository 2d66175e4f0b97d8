"""Builds the emulator's test kernels (tests/emulator/kernels) and calls them."""

import ctypes
import fcntl
import shutil
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "emulator"


def make(target: str, out: Path = OUT, **variables: str) -> None:
    """Brings a target of tests/emulator/Makefile up to date in the folder `out`, one process at a time."""
    out.mkdir(parents=True, exist_ok=True)
    settings = [f"{name}={value}" for name, value in variables.items()]
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["make", "-s", "-j2", "-f", "tests/emulator/Makefile", f"OUT={out}", *settings, target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def missing_tools() -> str | None:
    """What the host build lacks, or None."""
    return next((f"{tool} is not installed" for tool in ("make", "g++") if not shutil.which(tool)), None)


class Cases:
    """The launches of build/emulator/cases.so: `cases.reverse(bug, x, y, n)` returns the error's text, "" if none.

    Arrays go by pointer and must be contiguous; numbers are ints.
    """

    def __init__(self) -> None:
        make("emulated")
        self._library = ctypes.CDLL(str(OUT / "cases.so"))

    def __getattr__(self, name: str):
        function = getattr(self._library, f"{name}_case")
        function.restype = ctypes.c_char_p

        def call(*arguments: int | np.ndarray) -> str:
            passed = []
            for value in arguments:
                if isinstance(value, np.ndarray):
                    assert value.flags.c_contiguous
                    passed.append(ctypes.c_void_p(value.ctypes.data))
                else:
                    passed.append(ctypes.c_int(value))
            return function(*passed).decode()

        return call


def values(*shape: int) -> np.ndarray:
    """Float32 input."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def nothing(*shape: int) -> np.ndarray:
    """Room for float32 output."""
    return np.full(shape, np.nan, np.float32)
