"""`fusedseq._cuda_emulated`: csrc/cuda and its bindings, compiled with g++ against the emulator's headers, for tests.

The module is built into build/emulated on first use, and again whenever a source has changed. Nothing installs it.

    with cuda_emulated.device(sms=4), cuda.emulated(cuda_emulated.module()):
        ...
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulated"
NAME = "_cuda_emulated"
FLAGS = [
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-DFSQ_EMULATE",
    "-DFSQ_ISA=device", f"-DFSQ_CUDA_MODULE={NAME}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}",
]  # fmt: skip


def sources() -> list[Path]:
    return [
        *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        *sorted((ROOT / "csrc" / "bind" / "cuda").glob("*.cc")),
        *sorted((ROOT / "tests" / "emulator").glob("*.cc")),
    ]


def _compile(compiler: str, source: Path, python: list[str]) -> Path:
    """The object of one source, compiled unless it is newer than all that it was made from."""
    target = BUILD / f"{source.stem}.o"
    command = [compiler, *FLAGS, *python, "-MMD", "-x", "c++", "-c", str(source), "-o", str(target)]
    record, depfile = target.with_suffix(".cmd"), target.with_suffix(".d")
    if target.exists() and record.exists() and depfile.exists() and record.read_text() == shlex.join(command):
        inputs = shlex.split(depfile.read_text().replace("\\\n", " ").partition(":")[2])
        if all(os.path.exists(path) and os.path.getmtime(path) <= target.stat().st_mtime for path in inputs):
            return target
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    record.write_text(shlex.join(command))
    return target


def build() -> Path:
    """The compiled module, up to date."""
    import pybind11

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator needs g++")
    BUILD.mkdir(parents=True, exist_ok=True)
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    library = BUILD / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (BUILD / "lock").open("w") as lock:  # one process at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda source: _compile(compiler, source, python), sources()))
        if not library.exists() or any(one.stat().st_mtime > library.stat().st_mtime for one in objects):
            fresh = library.with_suffix(".new")
            subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(fresh)], check=True)
            os.replace(fresh, library)
    return library


@functools.cache
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, build())
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def device(seed: int = 0, **settings: int) -> Iterator[None]:
    """The emulated device has these settings (sms, shared, cluster, capability), its scheduler this seed."""
    wanted = {
        "FUSEDSEQ_EMULATOR_SEED": str(seed),
        "FUSEDSEQ_EMULATOR_DEVICE": ",".join(f"{name}={value}" for name, value in settings.items()),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
