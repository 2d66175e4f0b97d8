"""Which backend runs a call, and why: one decision per kind of call, remembered, visible and never silent."""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusedseq import config

if TYPE_CHECKING:
    from fusedseq.reference.attention import Problem


class BackendError(RuntimeError):
    """The backend that was named cannot be used, or strict mode forbids the fallback."""


class FallbackWarning(UserWarning):
    """A faster backend exists but did not take the call."""


class ScanCall(NamedTuple):
    """What a decision may depend on. T is the number of steps, also for packed input."""

    cell: str
    device: str
    dtype: torch.dtype
    T: int
    B: int
    I: int
    H: int
    R: int
    D: int
    packed: bool
    lengths: bool
    resets: bool
    cells: bool
    grad: bool


class AttentionCall(NamedTuple):
    """The same for attention. Flags say which parts of a mask, and what else, a call brings."""

    op: str  # "attention"
    device: str
    dtype: torch.dtype
    B: int
    Hq: int
    Hkv: int
    L: int
    S: int
    E: int
    Ev: int
    causal: bool
    window: bool
    lengths: bool
    packed: bool
    global_tokens: bool
    dense: bool
    bias: bool
    alibi: bool
    softcap: bool
    sinks: bool
    dropout: bool
    grad: bool

    @property
    def cell(self) -> str:
        """What parity records go by."""
        return self.op


class RowCall(NamedTuple):
    """The same for what works row by row: "layer_norm" (with residual and dropout) and "bias_activation"."""

    op: str
    device: str
    dtype: torch.dtype
    rows: int
    d: int
    activation: str
    residual: bool
    weight: bool
    bias: bool
    dropout: bool

    @property
    def cell(self) -> str:
        """What parity records go by."""
        return self.op


Call = ScanCall | AttentionCall | RowCall


def row_call(op: str, p: Any) -> RowCall:
    """The call of a problem of such an operator as a decision sees it."""
    x, d = p.x, p.x.shape[-1]
    return RowCall(
        op, "cpu" if x.is_cpu else x.device.type, x.dtype, x.numel() // d if d else 0, d,
        getattr(p, "activation", ""), p.residual is not None, getattr(p, "weight", None) is not None,
        p.bias is not None, p.dropout_p != 0,
    )  # fmt: skip


def attention_call(p: Problem, grad: bool) -> AttentionCall:
    """The call of a problem as a decision sees it."""
    q, v = p.q, p.v
    B, Hq, L, E = q.shape
    _, Hkv, S, Ev = v.shape
    return AttentionCall(
        "attention", "cpu" if q.is_cpu else q.device.type, q.dtype, B, Hq, Hkv, L, S, E, Ev,
        p.causal != 0, p.left >= 0 or (p.right >= 0 and not p.causal), p.key_lengths is not None, p.cu_q is not None,
        p.global_keys is not None, p.dense is not None, p.bias is not None, p.alibi_slopes is not None,
        p.softcap != 0, p.sinks is not None, p.dropout_p != 0, grad,
    )  # fmt: skip


def scan_call(
    cell: str,
    x: torch.Tensor,
    sizes: tuple[int, int, int, int, int, int],
    batch_sizes: object,
    lengths: object,
    resets: object,
    cells: bool,
    grad: bool,
) -> ScanCall:
    """The call as a decision sees it. `sizes` is T, B, I, H, R, D."""
    device = "cpu" if x.is_cpu else x.device.type
    packed, ragged, reset = batch_sizes is not None, lengths is not None, resets is not None
    # A third of the time that the constructor takes, on every streaming step.
    return tuple.__new__(ScanCall, (cell, device, x.dtype, *sizes, packed, ragged, reset, cells, grad))


class Choice(NamedTuple):
    """One decision: the backend that runs `call` and the reasons of those passed over before it.

    Where somebody watches, `how` names what the backend took from torch's settings for this call, such as "TF32".
    """

    call: Call
    backend: str
    module: ModuleType
    passed_over: dict[str, str]
    how: str = ""


class Kernel(NamedTuple):
    """Which of a backend's kernels ran one pass of a call."""

    op: str  # "attention"
    direction: str  # "forward" or "backward"
    backend: str
    name: str  # of the cuda backend's attention: "mma", "hopper" or "decode"
    reason: str  # why it was not the one preferred; empty if it was

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.op} {self.direction}: {self.name} of {self.backend}{why}"


# Each distinct (forced backend, call) is one entry; streams of ever-new lengths must not grow it without bound.
_CACHE_LIMIT = 4096
_decisions: dict[tuple[str, Call], Choice] = {}
_warned: set[str] = set()
_hooks: tuple[Callable[[Choice], None], ...] = ()
_kernel_hooks: tuple[Callable[[Kernel], None], ...] = ()
_modules: dict[str, ModuleType] = {}
_generation = 0


class _Forced(threading.local):
    """The backend named in this thread, "" if none. A threading.local, since torch.compile can guard on it."""

    name = config.settings.backend or ""


_forced = _Forced()


def backends() -> dict[str, ModuleType]:
    """All backends by name, in the order in which they are tried."""
    if not _modules:
        for name in config.BACKENDS:
            _modules[name] = importlib.import_module(f"fusedseq.backends.{name}")
    return _modules


def generation() -> tuple[int, str] | None:
    """What a decision that is kept elsewhere holds for: compare before use. None while calls are being watched."""
    return None if _hooks else (_generation, _forced.name)


def forced() -> str:
    """The backend named by `use_backend` or FUSEDSEQ_BACKEND, "" if the registry is free to choose."""
    return _forced.name


def choose(call: Call, name: str | None = None) -> ModuleType:
    """The backend module for this call. `name` overrides what the thread has forced; "" leaves the choice open."""
    key = (_forced.name if name is None else name, call)
    choice = _decisions.get(key)
    if choice is None:
        choice = _decide(*key)
        if len(_decisions) >= _CACHE_LIMIT:
            _decisions.clear()
        _decisions[key] = choice
    if _hooks:
        how = getattr(choice.module, "how", None)
        seen = choice if how is None else choice._replace(how=how(call))
        for hook in _hooks:
            hook(seen)
    return choice.module


def _refusal(module: ModuleType, call: Call) -> str | None:
    reason = module.missing()
    return f"not usable: {reason}" if reason is not None else module.supports(call)


def _elsewhere(module: ModuleType, call: Call) -> str | None:
    """Unless it is named, a backend is offered only tensors on its own device, where `device` names one."""
    home = getattr(module, "device", None)
    return None if home in (None, call.device) else f"it is for tensors on {home}, these are on {call.device}"


def _decide(name: str, call: Call) -> Choice:
    if name:
        module = _named(name)
        reason = module.supports(call)
        if reason is not None:
            raise BackendError(f"backend {name!r} was asked for by name but refuses {describe(call)}: {reason}")
        return Choice(call, name, module, {})
    passed_over: dict[str, str] = {}
    expected: dict[str, str] = {}
    for name, module in backends().items():
        elsewhere = _elsewhere(module, call)
        reason = elsewhere or _refusal(module, call)
        if reason is None:
            # To pass over what is for another device is no fallback, unless nothing is for this one.
            if passed_over and (expected or getattr(module, "device", None) is None):
                _report_fallback(name, call, expected or passed_over)
            return Choice(call, name, module, passed_over)
        passed_over[name] = reason
        if elsewhere is None:
            expected[name] = reason
    raise BackendError(f"no backend takes {describe(call)}: {_join(passed_over)}")


def _report_fallback(name: str, call: Call, passed_over: dict[str, str]) -> None:
    reasons = _join(passed_over)
    if config.settings.strict:
        raise BackendError(f"FUSEDSEQ_STRICT: {describe(call)} would fall back to {name!r} because {reasons}")
    if reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(
            f"fusedseq falls back to the backend {name!r} because {reasons}. This is said once; "
            "fusedseq.explain(...) shows every call, FUSEDSEQ_STRICT=1 makes it an error.",
            FallbackWarning,
            stacklevel=2,
        )


def _join(passed_over: dict[str, str]) -> str:
    return "; ".join(f"{name!r}: {reason}" for name, reason in passed_over.items())


def describe(call: Call) -> str:
    """A call in one line, as errors and reports print it."""
    fields = call._asdict()
    flags = [name for name, value in fields.items() if value is True]
    sizes = [f"{name}={value}" for name, value in fields.items() if type(value) is int]
    return " ".join([call.cell, call.device, str(call.dtype).removeprefix("torch."), *sizes, *flags])


def _named(name: str) -> ModuleType:
    module = backends().get(name)
    if module is None:
        raise ValueError(f"backend: expected one of {', '.join(config.BACKENDS)}, got {name!r}")
    reason = module.missing()
    if reason is not None:
        raise BackendError(f"backend {name!r} was asked for by name but is not usable: {reason}")
    return module


class use_backend:
    """Name the backend that runs every call of this thread; it takes the call or raises.

    As a plain call it holds until the next one; in a `with` statement what was in force before comes back at the
    end. `None` leaves the choice to the registry again.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            _named(name)
        self._before = _forced.name
        self.name = name
        _forced.name = name or ""

    def __enter__(self) -> use_backend:
        if _forced.name != (self.name or ""):
            # Made earlier and entered now: what is in force at this moment is what comes back.
            self._before = _forced.name
            _forced.name = self.name or ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _forced.name = self._before

    def __repr__(self) -> str:
        return f"use_backend({self.name!r})"


def reload() -> None:
    """Read the environment again and forget all decisions, for processes that change their environment."""
    global _generation
    _generation += 1
    config.settings = config.load()
    _Forced.name = config.settings.backend or ""
    vars(_forced).pop("name", None)
    _warned.clear()
    _decisions.clear()


def forget() -> None:
    """Decide anew from now on, where a backend has come or gone."""
    global _generation
    _generation += 1
    _decisions.clear()


def add_hook(hook: Callable[[Choice], None]) -> None:
    """Call `hook` with the `Choice` of every operator call, in every thread, until it is removed."""
    global _hooks
    _hooks = (*_hooks, hook)


def remove_hook(hook: Callable[[Choice], None]) -> None:
    global _hooks
    _hooks = tuple(one for one in _hooks if one is not hook)


def note_kernel(op: str, direction: str, backend: str, name: str, reason: str = "") -> None:
    """For backends that have several kernels for a pass: this one is about to run. In any thread."""
    for hook in _kernel_hooks:
        hook(Kernel(op, direction, backend, name, reason))


class Record(list[Choice]):
    """The choices of operator calls in order; `kernels`: what ran them, where a backend has several that might."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []


@contextlib.contextmanager
def record() -> Iterator[Record]:
    """Collect the choices made while the block runs: `{(c.call.cell, c.backend, c.call.dtype) for c in ran}`."""
    global _kernel_hooks
    ran = Record()
    hook, kernel_hook = ran.append, ran.kernels.append
    add_hook(hook)
    _kernel_hooks = (*_kernel_hooks, kernel_hook)
    try:
        yield ran
    finally:
        remove_hook(hook)
        _kernel_hooks = tuple(one for one in _kernel_hooks if one is not kernel_hook)


class Report:
    """What `explain` saw: `calls` lists every operator call in order, `kernels` what ran them (where a backend has
    several that might), `output` is what the callable returned."""

    def __init__(self, title: str, calls: list[Choice], output: Any, kernels: Sequence[Kernel] = ()) -> None:
        self.title = title
        self.calls = calls
        self.kernels = list(kernels)
        self.output = output

    @property
    def backends(self) -> set[str]:
        """The backends that ran."""
        return {choice.backend for choice in self.calls}

    def __repr__(self) -> str:
        count = len(self.calls)
        lines = [f"{self.title}: {count} operator call{'' if count == 1 else 's'}"]
        repeats: dict[str, int] = {}
        for choice in self.calls:
            text = f"  {describe(choice.call)} -> {choice.backend}" + (f" ({choice.how})" if choice.how else "")
            text += "".join(f"\n    not {name}: {reason}" for name, reason in choice.passed_over.items())
            repeats[text] = repeats.get(text, 0) + 1
        for text, times in repeats.items():
            first, *rest = text.split("\n")
            lines += [first + (f" (x{times})" if times > 1 else ""), *rest]
        for text, times in Counter(map(str, self.kernels)).items():
            lines.append(f"  {text}" + (f" (x{times})" if times > 1 else ""))
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Run a module or any callable and say which backend ran each operator call, and why not the others.

    >>> print(fusedseq.explain(model, x))
    """
    with record() as ran:
        output = function(*args, **kwargs)
    name = getattr(function, "__qualname__", None) or type(function).__name__
    return Report(name, ran, output, ran.kernels)
