"""Let torch.compile trace our modules whole.

TorchDynamo breaks the graph at every instance of torch.nn's RNN, LSTM and GRU, subclasses included, unless
``torch._dynamo.config.allow_rnn`` is set: it cannot trace their kernels. Ours are operators that it can. The flag is
raised only while one of our modules is looked at, so that torch.nn's own are treated as before. Dynamo takes more
than a second to import, so this waits until somebody else imports it.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fusedseq.nn.twins import Fused

_BUILDER = "torch._dynamo.variables.builder"


def _admit(builder: ModuleType) -> None:
    cls: Any = getattr(builder, "VariableBuilder", None)
    wrap = getattr(cls, "wrap_module", None)
    config: Any = getattr(builder, "config", None)
    if wrap is None or not hasattr(config, "allow_rnn"):
        return  # A dynamo that is built otherwise: graphs break at our modules as they do at torch.nn's.

    @functools.wraps(wrap)
    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, Fused):
            return wrap(self, value)
        with config.patch(allow_rnn=True):
            return wrap(self, value)

    cls.wrap_module = wrap_module


class _AtImport(MetaPathFinder):
    """Runs `_admit` once the module that it waits for has been executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _admit(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Admit our modules to TorchDynamo, now or when it is imported."""
    builder = sys.modules.get(_BUILDER)
    if builder is not None:
        _admit(builder)
    else:
        sys.meta_path.insert(0, _AtImport())
