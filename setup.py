"""Builds `fusedseq._cpu`, the compiled core; everything else about the package stands in pyproject.toml.

The core includes no torch header, so the build needs a C++17 compiler, setuptools and pybind11. Where it cannot
be built the install still succeeds, as pure Python, and the reference backend does the work.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
# A compiler for another processor may take the flags with no more than a warning; the macro tells.
ISA_MACROS = {"avx2": "__AVX2__", "avx512": "__AVX512F__", "avx512bf16": "__AVX512BF16__"}
DISPATCH = Path("csrc/cpu/dispatch.cc")  # detection must run on any CPU, so no ISA flag may touch it
SANITIZE = os.environ.get("FUSEDSEQ_SANITIZE", "0") == "1"  # an ASan and UBSan build, see `make sanitize`
REQUIRED = SANITIZE or os.environ.get("FUSEDSEQ_REQUIRE_CORE", "0") == "1"  # for developers: no core is an error

COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Icsrc",
]
SANITIZER = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []
OPTIMIZE = ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZER] if SANITIZE else ["-O3"]
# Clang's -fopenmp brings libomp, a second thread pool beside the libgomp that torch has already loaded.
OPENMP_PROBE = "#include <omp.h>\n#ifdef __clang__\n#error\n#endif\nint main() { return omp_get_max_threads() < 1; }"


def find_compiler() -> list[str]:
    """The C++ compiler: $CXX, else the one Python was built with, else the usual names."""
    for candidate in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "g++", "c++", "clang++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    raise CompileError("no C++ compiler found: install g++ (or clang++), or name one in the variable CXX")


def accepts(compiler: list[str], flags: list[str], program: str = "int main() { return 0; }") -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        command = [*compiler, *flags, "-x", "c++", "-", "-o", os.path.join(scratch, "probe")]
        return subprocess.run(command, input=program.encode(), capture_output=True).returncode == 0


def isa_probe(name: str) -> str:
    macro = ISA_MACROS.get(name)
    return (f"#ifndef {macro}\n#error\n#endif\n" if macro else "") + "int main() { return 0; }"


def up_to_date(target: Path, command: list[str]) -> bool:
    """Whether `target` came from this very command and is newer than all that its depfile names."""
    record, depfile = Path(f"{target}.cmd"), target.with_suffix(".d")
    if not (target.exists() and record.exists() and depfile.exists()) or record.read_text() != shlex.join(command):
        return False
    inputs = shlex.split(depfile.read_text().replace("\\\n", " ").partition(":")[2])
    return all(os.path.exists(path) and os.path.getmtime(path) <= target.stat().st_mtime for path in inputs)


def execute(command: list[str], target: Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.stdout:
        print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode:
        raise CompileError(f"the compiler failed on {target}: {shlex.join(command)}\n{done.stdout}")
    Path(f"{target}.cmd").write_text(shlex.join(command))


class BuildCore(build_ext):
    """Compiles csrc/cpu/*.cc once per ISA, the rest once, in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_core(Path(self.get_ext_fullpath(ext.name)))
        except CompileError as reason:
            if not REQUIRED:
                print(f"fusedseq: installing WITHOUT the compiled core, because {reason}", file=sys.stderr, flush=True)
            raise

    def build_core(self, library: Path) -> None:
        if os.name != "posix":
            raise CompileError(f"the core needs GCC or Clang on Linux or macOS; this is {sys.platform}")
        compiler = find_compiler()
        if not accepts(compiler, ["-std=c++17", "-fPIC"]):
            raise CompileError(f"{shlex.join(compiler)} cannot build a C++17 program")
        import pybind11

        openmp = ["-fopenmp"] if accepts(compiler, ["-fopenmp"], OPENMP_PROBE) else []
        isas = {name: flags for name, flags in ISAS.items() if accepts(compiler, flags, isa_probe(name))}
        have = [f"-DFSQ_HAVE_{name.upper()}=1" for name in isas if name != "baseline"]
        python = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
        builds = [(DISPATCH, "once", have)]
        builds += [(path, "once", python) for path in sorted(Path("csrc/bind").glob("*.cc"))]
        for path in sorted(set(Path("csrc/cpu").glob("*.cc")) - {DISPATCH}):
            builds += [(path, name, [f"-DFSQ_ISA={name}", *flags]) for name, flags in isas.items()]

        # Not build_temp: an editable install points that at a fresh folder, and nothing would be incremental.
        kind = "sanitize" if SANITIZE else "core"
        objects = Path("build", f"{kind}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        commands = {}
        for source, row, flags in builds:
            target = objects / row / source.parent.name / f"{source.stem}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            options = [*COMMON, *OPTIMIZE, *openmp, *flags]
            commands[target] = [*compiler, *options, "-MMD", "-c", str(source), "-o", str(target)]
        stale = {target: command for target, command in commands.items() if not up_to_date(target, command)}
        jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(execute, stale.values(), stale.keys()))

        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        linked = objects / library.name
        command = [*compiler, *shared, *OPTIMIZE, *openmp, *map(str, commands), "-o", str(linked)]
        linked.with_suffix(".d").write_text(f"{linked}: {shlex.join(map(str, commands))}")
        if stale or not up_to_date(linked, command):
            execute(command, linked)
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(linked, f"{library}.new")
        os.replace(f"{library}.new", library)  # never write into a library that a running process has mapped


setup(
    packages=[*find_packages(include=["fusedseq", "fusedseq.*"]), "fusedseq.kernels", "fusedseq.bench"],
    package_dir={"fusedseq.kernels": "kernels", "fusedseq.bench": "bench"},
    ext_modules=[Extension("fusedseq._cpu", sources=[], optional=not REQUIRED)],
    cmdclass={"build_ext": BuildCore},
)
