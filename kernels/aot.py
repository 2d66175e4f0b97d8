"""Every kernel as it ships, compiled ahead of time, with what it needs of a GPU: for machines that have none.

A module of kernels lists its variants in `variants()`; `MODULES` lists the modules. The command

    python -m fusedseq.kernels.aot [--part] [--write FILE]

compiles all of them, prints a table and writes it, as `tests/data/triton_resources.json` has it; with `--part` those
that differ most, which is what the tests have time for. It must not be run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = ("scan_variants", "rows_variants", "attention_variants")
CAPABILITIES = (80, 90)
# What a block can have of shared memory, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


class Variant(NamedTuple):
    """A kernel with all that settles its code. Of the arguments, what is no type is a constant.

    Types are written `"*bf16"`, `"i32"`, and `"i32:16"` for a multiple of 16.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    dots: bool  # whether tensor cores must show in its code
    warps: int = 4
    stages: int = 3
    registers: int | None = None  # `maxnreg`
    everywhere: bool = True  # else `--part` compiles it for the newest architecture only
    seldom: bool = False  # `--part` leaves it out altogether
    wide: bool = False  # whether its accesses of global memory must be of 8 bytes or more
    bulk: bool = False  # whether the copy engine (TMA) must fetch its tiles
    capabilities: tuple[int, ...] = CAPABILITIES  # where tiles differ, each has a variant of the same name


class Resources(NamedTuple):
    registers: int  # of a thread
    spills: int  # bytes of local memory of a thread
    shared: int  # bytes of shared memory of a block
    tensor_cores: str  # "wgmma", "mma" or "": what its PTX multiplies with


def variants() -> Iterator[Variant]:
    for name in MODULES:
        yield from importlib.import_module(f"fusedseq.kernels.{name}").variants()


def _source(variant: Variant) -> ASTSource:
    """Pointers are taken to be aligned to 16 bytes, as torch's allocator has them."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(variant.kernel.params):
        value = variant.arguments[parameter.name]
        if parameter.is_constexpr or not isinstance(value, str):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = value.removesuffix(":16")
        if value.startswith("*") or value.endswith(":16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, constants, attributes)


def build(variant: Variant, capability: int) -> Resources:
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "maxnreg": variant.registers}
    kernel = triton.compile(_source(variant), target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    cores = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    if variant.dots and not cores:
        raise RuntimeError(f"{variant.name} does not multiply on the tensor cores of sm_{capability}")
    narrow = {a for a in re.findall(r"(?:ld|st)\.global\S*", ptx) if not re.search(r"v4\.b32|v2\.b\d\d$", a)}
    if variant.wide and narrow:
        raise RuntimeError(f"{variant.name} has accesses of less than 8 bytes on sm_{capability}: {sorted(narrow)}")
    if variant.bulk and "cp.async.bulk.tensor" not in ptx:
        raise RuntimeError(f"{variant.name} fetches no tile through a descriptor on sm_{capability}")
    return Resources(*_usage(kernel.asm["cubin"]), kernel.metadata.shared, cores)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, as the disassembler in Triton's package reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"no resource usage in what cuobjdump says: {done.stdout!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _one(job: tuple[int, int]) -> Resources:
    index, capability = job
    return build(list(variants())[index], capability)


def names(part: bool = False) -> dict[str, list[str]]:
    """The variants of each architecture."""
    every = list(variants())
    return {
        f"sm_{c}": [
            v.name
            for v in every
            if c in v.capabilities and not (part and (v.seldom or not (v.everywhere or c == CAPABILITIES[-1])))
        ]
        for c in CAPABILITIES
    }


def table(part: bool = False, processes: int = 2) -> dict[str, dict[str, list[Any]]]:
    """By architecture and variant, the fields of `Resources`."""
    every = list(variants())
    index = {(v.name, c): i for i, v in enumerate(every) for c in v.capabilities}
    chosen = names(part)
    jobs = [(index[name, c], c) for c in CAPABILITIES for name in chosen[f"sm_{c}"]]
    with ProcessPoolExecutor(processes) as pool:
        results = list(pool.map(_one, jobs))
    found: dict[str, dict[str, list[Any]]] = {architecture: {} for architecture in chosen}
    for (i, capability), resources in zip(jobs, results, strict=True):
        found[f"sm_{capability}"][every[i].name] = list(resources)
    return found


def render(found: dict[str, dict[str, list[Any]]]) -> str:
    """The same as text for people."""
    lines = []
    for architecture, rows in found.items():
        lines.append(f"{architecture:<44} registers  spills  shared  tensor cores")
        for name, (registers, spills, shared, cores) in rows.items():
            lines.append(f"  {name:<42} {registers:>9} {spills:>7} {shared:>7}  {cores or '-'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusedseq.kernels.aot", description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the table to this file, as JSON")
    parser.add_argument("--part", action="store_true", help="leave out what differs little from the rest")
    options = parser.parse_args()
    found = table(options.part)
    print(render(found))
    if options.write:
        record = {"triton": triton.__version__, "columns": list(Resources._fields), **found}
        if options.part:
            record["names"] = names()
        options.write.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
