"""One kernel launched again and again, a number apart; part of the backend `triton`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Repeated:
    """Launches of `kernel` on `grid` that differ in the first argument, an integer that it is not specialized on.

    `args` are its other arguments in order, `options` its constants and how it is compiled, by name. The first launch
    is Triton's own, which compares every argument with what kernels were compiled for, some 50 us of Python. It returns
    the compiled kernel, which the later ones launch on the current stream, with addresses in the place of tensors.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.kernel, self.grid, self.args, self.options = kernel, grid, args, options
        self._later: Callable[..., Any] | None = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, number: int) -> None:
        if self._later is not None:
            self._later(number, *self._rest)
            return
        compiled = self.kernel[self.grid](number, *self.args, **self.options)
        if compiled is None:  # the interpreter compiles nothing
            return
        constants = self.kernel.arg_names[1 + len(self.args) :]
        values = (a.data_ptr() if isinstance(a, Tensor) else a for a in self.args)
        self._rest = (*values, *(self.options[name] for name in constants))
        self._later = compiled[(*self.grid, 1, 1)[:3]]
