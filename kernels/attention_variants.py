"""The attention kernels as they ship, for `aot`: the tiles of `attention_config` with what a call may bring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fusedseq.kernels import attention_backward, attention_bias, attention_far, attention_gradients
from fusedseq.kernels import attention_mask as bits
from fusedseq.kernels.aot import CAPABILITIES, Variant
from fusedseq.kernels.attention_config import sums, tile, tiled
from fusedseq.kernels.attention_decode import attention_merge_kernel
from fusedseq.kernels.attention_forward import attention_forward_kernel
from fusedseq.kernels.runtime import TYPES

KERNELS = {
    "forward": attention_forward_kernel,
    "dq": attention_backward.attention_dq_kernel,
    "dkv": attention_backward.attention_dkv_kernel,
    "far": attention_far.attention_far_kernel,
    "dbias": attention_bias.attention_dbias_kernel,
}
_LIKE_Q = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "bias")
_SINGLE = (
    "lse",
    "delta",
    "ready",
    "dlse",
    "part_out",
    "part_top",
    "part_total",
    "dbias",
    "row_slopes",
    "slopes",
    "sinks",
)
_POINTERS = {
    **dict.fromkeys(_SINGLE, "*fp32"),
    **dict.fromkeys(("lengths", "cu_q", "cu_k", "seed_at"), "*i64"),
    **dict.fromkeys(("positions", "ranks", "tile_sequence", "tile_first"), "*i32"),
    **dict.fromkeys(("dense", "global_keys"), "*u8"),
}
# What is None where a call does not have it.
_OPTIONAL = {
    "bias": bits.BIAS, "dense": bits.DENSE, "slopes": bits.ALIBI, "row_slopes": bits.ALIBI, "sinks": bits.SINKS,
    "lengths": bits.LENGTHS, "cu_q": bits.PACKED, "cu_k": bits.PACKED, "tile_sequence": bits.PACKED,
    "tile_first": bits.PACKED, "positions": bits.GLOBAL, "ranks": bits.GLOBAL, "global_keys": bits.GLOBAL,
    "seed_at": bits.DROPOUT, "part_total": bits.SPLIT,
}  # fmt: skip
_FLOATS = ("scale", "raw_scale", "softcap", "keep_scale")
_FULL = 0
_CAUSAL = bits.CAUSAL.value | bits.RIGHT.value
_WINDOW = _CAUSAL | bits.LEFT.value
_MANY = _WINDOW | bits.BIAS.value | bits.DROPOUT.value
_SHAPED = _CAUSAL | bits.ALIBI.value | bits.SOFTCAP.value | bits.SINKS.value | bits.LENGTHS.value
_PACKED = _CAUSAL | bits.PACKED.value | bits.GROUPED.value
_GLOBAL = _WINDOW | bits.GLOBAL.value


def _argument(name: str, dtype: torch.dtype, features: int, size: Any) -> Any:
    """The type of an argument, None where the call does not have it."""
    if name in _OPTIONAL and not features & _OPTIONAL[name].value:
        return None
    if name in _LIKE_Q:
        return f"*{TYPES[dtype].name}"
    if name in _POINTERS:
        return _POINTERS[name]
    if name in _FLOATS:
        return "fp32"
    if size is not None or name in ("sbs", "sds"):  # tables are dense along the keys; an argument of 1 is a constant
        return 1 if size is None else size
    stride = name.startswith("s") and name not in ("section", "sequences")
    return "i64" if name == "limit" else "i32:16" if stride else "i32"


def _variant(
    kernel: str, what: str, features: int, width: int, dtype: torch.dtype, capability: int, everywhere: bool,
    rows: int = 4096, size: Any = None, tiles_of: tuple[int, int] | None = None,
) -> Variant:  # fmt: skip
    single = dtype == torch.float32
    if single:
        features |= bits.EXACT.value
    elif not features & bits.ALTERED.value:
        features |= bits.FOLDED.value
    bulk = what.endswith("-tma")
    features |= bits.TILED.value if bulk else 0
    chosen = tile(kernel, width, dtype, tiles_of or divmod(capability, 10), features, rows)
    descriptor = f"tensordesc<{TYPES[dtype].name}[1, 1, {chosen.BN}, {width}]>" if bulk else None
    function = KERNELS[kernel]
    given: dict[str, Any] = {
        "FEATURES": features, "BM": chosen.BM, "BN": chosen.BN, "BE": width, "BV": width, "DOT": TYPES[dtype],
        "key_descriptor": descriptor, "value_descriptor": descriptor,
        "PRECISION": "ieee", "EDGES": chosen.edges,
        "OVER_BATCH": True, "OVER_HEADS": False, "OVER_ROWS": False, "OVER_KEYS": False,
    }  # fmt: skip
    arguments = {name: given[name] if name in given else _argument(name, dtype, features, size)
                 for name in function.arg_names}  # fmt: skip
    if kernel == "far" or (kernel == "dkv" and features & bits.GLOBAL.value):
        arguments["dk"] = arguments["dv"] = "*fp32"
    name = f"attention-{kernel}-{width}-{'f32' if single else 'bf16'}-{what}"
    shape = {"warps": chosen.warps, "stages": chosen.stages}
    return Variant(
        name, function, arguments, not single, **shape, everywhere=everywhere, bulk=bulk, capabilities=(capability,)
    )


def variants() -> Iterator[Variant]:
    for capability in CAPABILITIES:
        for width in (64, 128, 256):
            yield from _each(width, torch.bfloat16, capability)
        yield from _each(64, torch.float32, capability)
        for size, what in ((None, "bare"), (1, "ones")):
            for kernel in KERNELS:
                also = bits.BIAS.value if kernel == "dbias" else _GLOBAL if kernel == "far" else bits.DROPOUT.value
                also |= bits.WITH_DK.value | bits.WITH_DV.value if kernel in ("dkv", "far") else 0
                yield _variant(kernel, what, also, 16, torch.bfloat16, capability, False, size=size)
    yield from _small()
    for width in (64, 256):
        yield from _rows(width, None)
    yield from _rows(16, 1)


def _small() -> Iterator[Variant]:
    """The tiles of GPUs with less shared memory, whose instructions are those of sm_80."""
    for what, features in (("causal", _CAUSAL), ("many", _MANY)):
        for kernel, also, name in (
            ("dq", 0, ""),
            ("dkv", bits.WITH_DK.value, "-dk"),
            ("dkv", bits.WITH_DV.value, "-dv"),
        ):
            yield _variant(
                kernel, f"{what}{name}-99KB", features | also, 256, torch.bfloat16, 80, False, tiles_of=(8, 9)
            )  # fmt: skip


def _each(width: int, dtype: torch.dtype, capability: int) -> Iterator[Variant]:
    kinds = {"causal": _CAUSAL, "many": _MANY}
    if width <= 128 and dtype != torch.float32:
        kinds["full"] = _FULL
    if width == 128:
        kinds |= {"shaped": _SHAPED, "packed": _PACKED, "global": _GLOBAL}
    for what, features in kinds.items():
        main = what == "causal" and width < 256
        yield _variant("forward", what, features, width, dtype, capability, main)
        lone = features & ~bits.LENGTHS.value  # key lengths have no descriptor
        if tiled("forward", dtype, divmod(capability, 10), lone, 4096):
            yield _variant("forward", f"{what}-tma", lone, width, dtype, capability, main)
            if what == "causal":
                dealt = lone | bits.DEALT.value
                yield _variant("forward", f"{what}-dealt-tma", dealt, width, dtype, capability, False)
        # The backward pass never sees a sink: lse has it.
        features &= ~bits.SINKS.value
        yield _variant("dq", what, features, width, dtype, capability, main)
        if tiled("dq", dtype, divmod(capability, 10), features, 4096):
            yield _variant("dq", f"{what}-tma", features, width, dtype, capability, main)
        names = {3: "", 1: "-dk", 2: "-dv"}
        for which in sums(width):
            suffix = names[which // bits.WITH_DK.value]
            yield _variant("dkv", what + suffix, features | which, width, dtype, capability, main)
            if what == "global":
                yield _variant("far", what + suffix, features | which, width, dtype, capability, False)
        if what == "many" and dtype != torch.float32:
            yield _variant("dbias", what, features, width, dtype, capability, False)
    if width == 128:
        decode = _CAUSAL | bits.BOTTOM_RIGHT.value | bits.LENGTHS.value | bits.GROUPED.value | bits.SPLIT.value
        yield _variant("forward", "decode", decode, width, dtype, capability, True, rows=8)


def _rows(width: int, size: Any) -> Iterator[Variant]:
    for function, name, more in (
        (attention_gradients.attention_delta_kernel, "delta", {"BM": 32, "WITH_DLSE": True}),
        (attention_merge_kernel, "merge", {}),
    ):
        given = {"FEATURES": bits.SINKS.value, "BV": width, "rows": "i32" if size is None else size, **more}
        features = bits.SINKS.value | bits.SPLIT.value
        arguments = {one: given[one] if one in given else _argument(one, torch.bfloat16, features, size)
                     for one in function.arg_names}  # fmt: skip
        what = f"attention-{name}-{width}-bf16" + ("" if size is None else "-ones")
        yield Variant(what, function, arguments, False, 1 if name == "merge" else 4, everywhere=False)
