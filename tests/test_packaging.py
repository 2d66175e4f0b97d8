"""What a user gets by installing: the build files, the shipped package, and life without the compiled core."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import fusedseq

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fusedseq.__file__).parent


@pytest.fixture(scope="module")
def core() -> ModuleType:
    if importlib.util.find_spec("fusedseq._cpu") is None:
        pytest.skip("the compiled core is not built")
    return importlib.import_module("fusedseq._cpu")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, which finds the same package as this one."""
    path = {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def project_version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_setup_imports_no_torch() -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"setuptools", "pybind11"}


def test_core_includes_no_torch() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cc", ".cu", ".cuh")]
    included = [line for path in sources for line in path.read_text().splitlines() if line.startswith("#include")]
    assert included
    assert not [line for line in included if re.search(r"torch/|ATen/|c10/", line)]


def test_version_is_stated_once() -> None:
    assert fusedseq.__version__ == project_version()
    assert f"## {project_version()}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["kernels", "bench", "reference", "ops", "nn", "backends", "testing"])
def test_subpackages_are_installed(name: str) -> None:
    assert importlib.import_module(f"fusedseq.{name}").__doc__


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_cpu.pyi").exists()


def test_stub_matches_the_core(core: ModuleType) -> None:
    stub = ast.parse((PACKAGE / "_cpu.pyi").read_text())
    described = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name for node in stub.body if isinstance(node, ast.ClassDef)}
    public = {name for name, value in vars(core).items() if callable(value) and not name.startswith("_")}
    assert set(described) | classes == public
    for name, node in described.items():
        # pybind11 writes the signature as the first line of the docstring, with the types but without names.
        signature = (inspect.getdoc(getattr(core, name)) or "").partition("\n")[0]
        assert not node.args.args
        assert len(node.args.posonlyargs) == len(re.findall(r"arg\d+: ", signature)), signature


def test_core_shares_the_thread_pool_of_torch(core: ModuleType) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("ELF only")
    needed = python(
        f"""
        import torch, ctypes
        ctypes.CDLL({core.__file__!r})
        print({{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}})
        """
    )
    assert needed.returncode == 0, needed.stderr
    pools = ast.literal_eval(needed.stdout)
    assert len(pools) <= 1, f"two thread pools in one process: {pools}"
    linked = re.findall(rb"lib(?:gomp|omp|iomp5)[\w.-]*\.so[\w.]*", Path(core.__file__).read_bytes())
    assert set(linked) <= {b"libgomp.so.1"}


def test_import_order_does_not_matter(core: ModuleType) -> None:
    done = python("import fusedseq._cpu as core, torch; assert core.isa() in core.isas()")
    assert done.returncode == 0, done.stderr


def test_without_the_core_the_reference_works_and_says_so_once() -> None:
    done = python(
        """
        import sys, warnings
        sys.modules["fusedseq._cpu"] = None  # as if it had never been built
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, fusedseq
            lstm = fusedseq.LSTM(3, 4)
            for length in (5, 6):
                lstm(torch.randn(length, 2, 3))[0].sum().backward()
        said = [str(warning.message) for warning in caught if "fusedseq" in str(warning.message)]
        assert len(said) == 1, said
        assert "reference" in said[0], said
        """,
        FUSEDSEQ_BACKEND="",
        FUSEDSEQ_STRICT="",
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_compiler_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/no-compiler"],
        cwd=ROOT,
        env={"PATH": "", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "WITHOUT the compiled core" in done.stderr
    assert "install g++" in done.stderr
