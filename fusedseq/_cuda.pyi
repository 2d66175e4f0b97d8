"""Fused sequence kernels for NVIDIA GPUs. Addresses, sizes and strides by name; fusedseq.backends.cuda is the caller.

Names that a dict does not hold are null. Tensors with rows are (address, time stride, batch stride) in elements.
"""

from typing import Any

architectures: str  # what the kernels were compiled for, such as "80 90a"
tiers: tuple[str, ...]

class Plan:
    """How the current device runs a scan."""

    tier: int
    ranks: int
    rows: int
    units: int
    warps: int
    shared: int
    workspace: int
    zeroed: bool
    together: int
    stuck: int

def device() -> tuple[int, int, int, int]: ...  # 10 x compute capability, SMs, shared bytes of a CTA, CTAs of a cluster
def plan(cell: int, dtype: int, sizes: tuple[int, ...], projected: bool, backward: bool, tier: int) -> Plan: ...
def scan_forward(plan: Plan, cell: int, dtype: int, sizes: tuple[int, ...], named: dict[str, Any]) -> None: ...
def scan_backward(plan: Plan, cell: int, dtype: int, sizes: tuple[int, ...], named: dict[str, Any]) -> None: ...
def previous(cell: int, dtype: int, sizes: tuple[int, ...], named: dict[str, Any]) -> None: ...
def attention_forward(
    sizes: tuple[int, ...], tensors: tuple[Any, ...], options: tuple[Any, ...], named: dict[str, Any]
) -> None: ...
def attention_hopper(
    sizes: tuple[int, ...], tensors: tuple[Any, ...], options: tuple[Any, ...], named: dict[str, Any]
) -> None: ...
def attention_hopper_refuses(
    sizes: tuple[int, ...], tensors: tuple[Any, ...], options: tuple[Any, ...], named: dict[str, Any]
) -> str: ...
def attention_backward(
    sizes: tuple[int, ...],
    tensors: tuple[Any, ...],
    options: tuple[Any, ...],
    named: dict[str, Any],
    grads: tuple[Any, ...],
) -> None: ...
def attention_backward_hopper(
    sizes: tuple[int, ...],
    tensors: tuple[Any, ...],
    options: tuple[Any, ...],
    named: dict[str, Any],
    grads: tuple[Any, ...],
) -> None: ...
def attention_backward_hopper_refuses(
    sizes: tuple[int, ...],
    tensors: tuple[Any, ...],
    options: tuple[Any, ...],
    named: dict[str, Any],
    grads: tuple[Any, ...],
) -> str: ...
def attention_backward_shared(E: int, Ev: int, bias: bool, dropout: bool) -> int: ...
