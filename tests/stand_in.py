"""A stand-in for the vendor's library of matrix products, on the CPU, which the emulated CUDA backend then calls."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedseq.backends import cuda_products

SOURCE = Path(__file__).resolve().parent / "library" / "cublas.cc"


class StandIn:
    """Counts of what it was asked for so far."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.stand_in_products.restype = self._library.stand_in_rounded.restype = ctypes.c_int64

    @property
    def products(self) -> int:
        return int(self._library.stand_in_products())

    @property
    def rounded(self) -> int:
        """Those of them that may round float32 to TF32."""
        return int(self._library.stand_in_rounded())


def build(folder: Path) -> StandIn:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the stand-in needs g++")
    path = folder / cuda_products.STAND_IN
    named = f"-Wl,-soname,{path.name}"  # by which the loader knows it, as it knows the real one
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", named]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path)], check=True)
    return StandIn(path)
