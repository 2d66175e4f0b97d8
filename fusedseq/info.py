"""What this installation consists of and runs on: versions, backends, instruction sets, threads, environment.

Needs torch and numpy only, and works without the compiled core.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fusedseq
from fusedseq import config, registry

PACKAGES = ("numpy", "triton", "onnxruntime", "onnx", "matplotlib", "rich", "pytest-benchmark", "nvidia-ml-py")


def collect() -> dict[str, Any]:
    """Everything, as plain values that JSON can hold."""
    return {
        "versions": versions(),
        "machine": machine(),
        "backends": backends(),
        "isa": isa(),
        "threads": threads(),
        "openmp": openmp(),
        "environment": config.in_force(),
    }


def versions() -> dict[str, str | None]:
    """None stands for a package that is not installed."""
    found: dict[str, str | None] = {
        "fusedseq": fusedseq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": caches(),
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
    }


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return " ".join(value.split())
    except OSError:
        pass
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Sizes of the first core's caches by name, such as L1d: 32K; empty where the system does not say."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') }"] = size
    return found


def backends() -> dict[str, str | None]:
    """Why each backend is missing, in the order in which they are tried; None: it is usable."""
    return {name: module.missing() for name, module in registry.backends().items()}


def kernels() -> int:
    """Compile every Triton kernel and print what it needs of a GPU; the exit status of that."""
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: it comes with torch on Linux, or pip install triton", file=sys.stderr)
        return 1
    return subprocess.run([sys.executable, "-m", "fusedseq.kernels.aot"], env=config.compiling()).returncode


def isa() -> dict[str, Any]:
    try:
        from fusedseq import _cpu
    except ImportError:
        return {"in_use": None, "available": [], "known": list(config.ISAS)}
    return {"in_use": _cpu.isa(), "available": _cpu.isas(), "known": list(config.ISAS)}


def threads() -> dict[str, int]:
    return {"torch": torch.get_num_threads(), "torch_interop": torch.get_num_interop_threads()}


def openmp() -> dict[str, Any]:
    """The OpenMP libraries in this process. Two would mean two thread pools that take cores from each other."""
    libraries: set[str] = set()
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            found = re.search(r"/([^/]*lib(?:gomp|iomp5|omp)[^/]*)$", line)
            if found:
                libraries.add(found[1])
    except OSError:
        pass
    return {"torch": torch.backends.openmp.is_available(), "libraries": sorted(libraries)}


def render(info: dict[str, Any]) -> str:
    """The same as text for people."""
    lines = []

    def section(title: str, pairs: dict[str, Any]) -> None:
        lines.append(title)
        width = max(map(len, pairs), default=0)
        lines.extend(f"  {name:<{width}}  {value}" for name, value in pairs.items())

    box, rows, pool = info["machine"], info["isa"], info["openmp"]
    section("versions", {name: value or "not installed" for name, value in info["versions"].items()})
    described = ", ".join(f"{name} {size}" for name, size in box["caches"].items())
    section(
        "machine",
        {
            "cpu": f"{box['cpu']} ({box['architecture']}, {box['system']}), {box['cores']} cores for this process",
            "caches": described or "unknown",
            "gpus": ", ".join(box["gpus"]) or "none",
        },
    )
    section("backends", {name: f"missing: {why}" if why else "usable" for name, why in info["backends"].items()})
    available = [f"{name}{' (in use)' if name == rows['in_use'] else ''}" for name in rows["available"]]
    section(
        "instruction sets of the cpu backend",
        {
            "available": ", ".join(available) or "none: there is no compiled core",
            "not on this machine": ", ".join(n for n in rows["known"] if n not in rows["available"]) or "none",
        },
    )
    section(
        "threads",
        {
            "torch": f"{info['threads']['torch']} within an operation, {info['threads']['torch_interop']} between",
            "OpenMP": ", ".join(pool["libraries"]) or ("in torch" if pool["torch"] else "none"),
        },
    )
    section("environment variables in force", info["environment"] or {"none": ""})
    return "\n".join(line.rstrip() for line in lines)
