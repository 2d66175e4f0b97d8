"""Builds `fusedseq._cpu`, the compiled core, and where nvcc is at hand `fusedseq._cuda`; everything else about the
package stands in pyproject.toml.

Neither includes a torch header, so the build needs a C++17 compiler, setuptools and pybind11. Where one cannot
be built the install still succeeds, and other backends do the work.
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
# The GPU kernels: auto builds them if there is an nvcc, 1 makes their failure an error, 0 leaves them out.
CUDA = os.environ.get("FUSEDSEQ_CUDA", "auto").strip().lower() or "auto"
CUDA_ARCHS = os.environ.get("FUSEDSEQ_CUDA_ARCHS", "").replace(",", " ").split() or ["80", "90a"]

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


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, else the one on the path, else that of the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.path.join(home, "bin") for home in homes] + [None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def wants_cuda() -> bool:
    if CUDA not in ("auto", "0", "1"):
        raise SystemExit(f"FUSEDSEQ_CUDA: expected auto, 0 or 1, got {CUDA!r}")
    return CUDA == "1" or (CUDA == "auto" and not SANITIZE and find_nvcc() is not None)


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
    """Compiles csrc/cpu/*.cc once per ISA, csrc/cuda/*.cu for all GPUs at once and the rest once, in parallel, and only
    what changed."""

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name.endswith("._cuda")
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            if os.name != "posix":
                raise CompileError(f"the core needs GCC or Clang on Linux or macOS; this is {sys.platform}")
            compiler = find_compiler()
            if not accepts(compiler, ["-std=c++17", "-fPIC"]):
                raise CompileError(f"{shlex.join(compiler)} cannot build a C++17 program")
            (self.build_cuda if cuda else self.build_core)(compiler, library)
        except CompileError as reason:
            if ext.optional:
                part = "GPU kernels" if cuda else "compiled core"
                print(f"fusedseq: installing WITHOUT the {part}, because {reason}", file=sys.stderr, flush=True)
            raise

    def build_core(self, compiler: list[str], library: Path) -> None:
        openmp = ["-fopenmp"] if accepts(compiler, ["-fopenmp"], OPENMP_PROBE) else []
        isas = {name: flags for name, flags in ISAS.items() if accepts(compiler, flags, isa_probe(name))}
        have = [f"-DFSQ_HAVE_{name.upper()}=1" for name in isas if name != "baseline"]
        builds = [(DISPATCH, "once", have)]
        builds += [(path, "once", bindings()) for path in sorted(Path("csrc/bind").glob("*.cc"))]
        for path in sorted(set(Path("csrc/cpu").glob("*.cc")) - {DISPATCH}):
            builds += [(path, name, [f"-DFSQ_ISA={name}", *flags]) for name, flags in isas.items()]
        objects = build_folder("sanitize" if SANITIZE else "core")
        commands = {}
        for source, row, flags in builds:
            target = objects / row / source.parent.name / f"{source.stem}.o"
            options = [*COMMON, *OPTIMIZE, *openmp, *flags]
            commands[target] = [*compiler, *options, "-MMD", "-c", str(source), "-o", str(target)]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        make(commands, [*compiler, *shared, *OPTIMIZE, *openmp], library, objects)

    def build_cuda(self, compiler: list[str], library: Path) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("no nvcc found: install the CUDA toolkit, or name its folder in CUDA_HOME")
        objects = build_folder("cuda")
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
        device = ["-std=c++17", "-O3", "-Icsrc", "-DFSQ_ISA=device", "-ccbin", compiler[0], *archs]
        hidden = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        commands = {}
        for source in sorted(Path("csrc/cuda").glob("*.cu")):
            target = objects / f"{source.stem}.o"
            depend = ["-MMD", "-MF", str(target.with_suffix(".d"))]
            commands[target] = [nvcc, *device, *hidden, *depend, "-c", str(source), "-o", str(target)]
        flags = [*COMMON, *OPTIMIZE, *bindings(), f'-DFSQ_CUDA_ARCHS="{" ".join(CUDA_ARCHS)}"']
        for source in sorted(Path("csrc/bind/cuda").glob("*.cc")):
            target = objects / "bind" / f"{source.stem}.o"
            commands[target] = [*compiler, *flags, "-MMD", "-c", str(source), "-o", str(target)]
        # The runtime goes in, so that the module loads where there is no driver.
        make(commands, [nvcc, "-shared", "-cudart", "static", "-ccbin", compiler[0]], library, objects)


def bindings() -> list[str]:
    import pybind11

    return [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]


def build_folder(kind: str) -> Path:
    """Not build_temp: an editable install points that at a fresh folder, and nothing would be incremental."""
    return Path("build", f"{kind}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")


def make(commands: dict[Path, list[str]], link: list[str], library: Path, objects: Path) -> None:
    """Bring each target of `commands` up to date by its command, and `library` by linking them."""
    for target in commands:
        target.parent.mkdir(parents=True, exist_ok=True)
    stale = {target: command for target, command in commands.items() if not up_to_date(target, command)}
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(execute, stale.values(), stale.keys()))
    linked = objects / library.name
    command = [*link, *map(str, commands), "-o", str(linked)]
    linked.with_suffix(".d").write_text(f"{linked}: {shlex.join(map(str, commands))}")
    if stale or not up_to_date(linked, command):
        execute(command, linked)
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(linked, f"{library}.new")
    os.replace(f"{library}.new", library)  # never write into a library that a running process has mapped


setup(
    packages=[*find_packages(include=["fusedseq", "fusedseq.*"]), "fusedseq.kernels", "fusedseq.bench"],
    package_dir={"fusedseq.kernels": "kernels", "fusedseq.bench": "bench"},
    ext_modules=[
        Extension("fusedseq._cpu", sources=[], optional=not REQUIRED),
        *([Extension("fusedseq._cuda", sources=[], optional=CUDA != "1")] if wants_cuda() else []),
    ],
    cmdclass={"build_ext": BuildCore},
)
