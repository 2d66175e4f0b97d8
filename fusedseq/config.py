"""Every environment variable of the project is read here, once, at import. ENVS.md describes them for users."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# In priority order: the registry tries them from left to right.
BACKENDS = ("cpu", "cuda", "triton", "reference")
# From plain to richest, as `fusedseq._cpu.isas()` names them.
ISAS = ("baseline", "avx2", "avx512", "avx512bf16")

# How the cuda backend may run a scan, as `fusedseq._cuda.tiers` names them; docs/gpu-scans.md.
CUDA_TIERS = ("step", "block", "cluster", "grid")

# Which kernels the cuda backend has for tier cluster; docs/gpu-scans.md.
CUDA_CLUSTER = ("block", "warp")

# Which kernels the cuda backend has for attention; docs/gpu-attention-hopper.md.
CUDA_ATTENTION = ("mma", "hopper")

# Who calls the vendor's library for the products of the cuda backend; docs/gpu-scans.md.
CUDA_PRODUCTS = ("torch", "direct")

# How the names begin of variables that change what runs or how fast, ours and those of the libraries beneath.
_RELATED = (
    "FUSEDSEQ_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "ATEN_", "TORCH", "TRITON_",
    "MALLOC_", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip

_TRUE = ("1", "true", "on", "yes")
_FALSE = ("", "0", "false", "off", "no")


@dataclass(frozen=True)
class Settings:
    """What the environment asked for; None means the variable leaves the choice open."""

    backend: str | None = None
    strict: bool = False
    isa: str | None = None
    scratch_mb: int = 256
    interpret: bool = False
    autotune: bool = False
    cuda_tier: str | None = None
    cuda_cluster: str | None = None
    cuda_attention: str | None = None
    cuda_products: str | None = None


def _one_of(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    value = environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)} or auto, got {environ[name]!r}")
    return value


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name}: expected 1 or 0, got {environ[name]!r}")


def _count(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, "").strip()
    if not value:
        return default
    if not value.isdecimal():
        raise ValueError(f"{name}: expected a whole number of at least 0, got {environ[name]!r}")
    return int(value)


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and validate the variables; a value nobody understands is an error, never ignored."""
    environ = os.environ if environ is None else environ
    return Settings(
        backend=_one_of(environ, "FUSEDSEQ_BACKEND", BACKENDS),
        strict=_flag(environ, "FUSEDSEQ_STRICT"),
        isa=_one_of(environ, "FUSEDSEQ_ISA", ISAS),
        scratch_mb=_count(environ, "FUSEDSEQ_SCRATCH_MB", Settings.scratch_mb),
        autotune=_flag(environ, "FUSEDSEQ_AUTOTUNE"),
        cuda_tier=_one_of(environ, "FUSEDSEQ_CUDA_TIER", CUDA_TIERS),
        cuda_cluster=_one_of(environ, "FUSEDSEQ_CUDA_CLUSTER", CUDA_CLUSTER),
        cuda_attention=_one_of(environ, "FUSEDSEQ_CUDA_ATTENTION", CUDA_ATTENTION),
        cuda_products=_one_of(environ, "FUSEDSEQ_CUDA_PRODUCTS", CUDA_PRODUCTS),
        # Triton's own variable, and its own reading of it.
        interpret=environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"),
    )


def in_force(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that are set and change what runs or how fast."""
    environ = os.environ if environ is None else environ
    return {name: value for name, value in sorted(environ.items()) if name.startswith(_RELATED) and value}


def compiling() -> dict[str, str]:
    """The environment of a process that compiles Triton's kernels, whatever this one does with them."""
    return {**os.environ, "TRITON_INTERPRET": "0"}


settings = load()
