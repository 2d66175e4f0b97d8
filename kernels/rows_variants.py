"""The row kernels as they ship, for `aot`."""

from __future__ import annotations

from collections.abc import Iterator

from fusedseq.kernels import bias_activation, layer_norm
from fusedseq.kernels.aot import Variant


def variants() -> Iterator[Variant]:
    yield from _whole()
    # Sizes of 1 are constants to the compiler, and what is left out is None.
    sizes = {"rows": 1, "d": 1, "limit": 1, "scale": "fp32", "eps": "fp32", "tiles": 1, "NAME": "gelu"}
    bare = dict.fromkeys(("residual", "weight", "bias", "total", "dtotal", "dresidual", "dweight", "dbias"))
    for kernel in (layer_norm.forward, layer_norm.backward, bias_activation.forward, bias_activation.backward):
        t = dict.fromkeys(("x", "out", "dout", "dx"), "*fp32")
        given = {**sizes, **bare, **t, "seed": "*i64", "BM": 16, "BN": 64}
        name = kernel.__module__.rpartition(".")[2]
        yield Variant(f"{name}-{kernel.__name__}-ones", kernel, given, dots=False, everywhere=False)
        given = {**given, "rows": "i32", "d": "i32", "limit": "i64", "seed": None, "tiles": "i32"}
        yield Variant(f"{name}-{kernel.__name__}-bare", kernel, given, dots=False, everywhere=False)


def _whole() -> Iterator[Variant]:
    t, sizes = "*bf16", {"rows": "i32", "d": "i32", "limit": "i64", "scale": "fp32", "eps": "fp32", "tiles": "i32"}
    for width, d in ((1024, "i32"), (2048, "i32"), (4096, "i32:16")):
        given = {
            **sizes, "d": d, "x": t, "residual": t, "weight": t, "bias": t, "seed": "*i64", "out": t, "total": t,
            "dout": t, "dtotal": t, "dx": t, "dresidual": t, "dweight": "*fp32", "dbias": "*fp32",
            "BM": max(1, 2048 // width), "BN": width,
        }  # fmt: skip
        for kernel in (layer_norm.forward, layer_norm.backward):
            warps = max(4, min(32, width // 256))
            yield Variant(f"layer_norm-{width}-bf16-{kernel.__name__}", kernel, given, dots=False, warps=warps)
    for name in ("relu", "gelu", "gelu_tanh", "silu"):
        given = {
            **sizes, "x": t, "bias": t, "residual": t, "seed": "*i64", "out": t, "dout": t, "dx": t, "dbias": "*fp32",
            "NAME": name, "BM": 4, "BN": 512,
        }  # fmt: skip
        for kernel in (bias_activation.forward, bias_activation.backward):
            yield Variant(f"bias_activation-{name}-bf16-{kernel.__name__}", kernel, given, dots=False)
