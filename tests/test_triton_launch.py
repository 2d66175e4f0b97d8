"""Launches that differ in one number: Triton's own once, then the compiled kernel with the same arguments in the order
of its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedseq import registry

if (reason := registry.backends()["triton"].missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fusedseq.backends.triton_launch import Repeated
from fusedseq.kernels.scan_backward import step_backward
from fusedseq.kernels.scan_forward import step_forward

Calls = list[tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]


class Compiled:
    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append(("compiled", grid, args, {}))


class Kernel:
    """What stands for a kernel: its parameters, and a record of what it is launched with."""

    def __init__(self, arg_names: list[str], compiled: Compiled | None, calls: Calls) -> None:
        self.arg_names, self.compiled, self.calls = arg_names, compiled, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Compiled | None:
            self.calls.append(("triton", grid, args, options))
            return self.compiled

        return launch


def prepared(kernel: Any, compiled: bool, calls: Calls) -> tuple[Repeated, tuple[Any, ...], dict[str, Any]]:
    names = list(kernel.arg_names)
    constants = [name for name in names if name.isupper() and len(name) > 1]
    count = len(names) - len(constants)
    assert names[0] == "s" and names[count:] == constants  # constants come last
    args: tuple[Any, ...] = tuple(torch.zeros(n) if n % 3 else None for n in range(1, count))
    options = {name: f"constant {name}" for name in reversed(constants)} | {"num_warps": 4, "maxnreg": None}
    stub = Kernel(names, Compiled(calls) if compiled else None, calls)
    return Repeated(stub, (3, 2), args, options), args, options


@pytest.mark.parametrize("kernel", [step_forward, step_backward], ids=["forward", "backward"])
def test_later_launches_are_of_the_compiled_kernel(kernel: Any) -> None:
    calls: Calls = []
    launch, args, options = prepared(kernel, True, calls)
    for step in (2, 1, -1):
        launch(step)
    assert calls[0] == ("triton", (3, 2), (2, *args), options)
    addresses = tuple(None if a is None else a.data_ptr() for a in args)
    constants = tuple(f"constant {name}" for name in kernel.arg_names[1 + len(args) :])
    assert calls[1:] == [("compiled", (3, 2, 1), (step, *addresses, *constants), {}) for step in (1, -1)]


def test_the_interpreter_is_asked_every_time() -> None:
    calls: Calls = []
    launch, args, options = prepared(step_forward, False, calls)
    for step in range(3):
        launch(step)
    assert calls == [("triton", (3, 2), (step, *args), options) for step in range(3)]
