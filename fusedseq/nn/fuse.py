"""`fuse` puts the fused modules into a model that was built with torch.nn; `unfuse` takes them out again.

A module is swapped by giving the same object another class. Parameters, buffers, hooks, parametrizations, the training
flag, extra attributes, every reference to the module and the optimizer's to its parameters then need no care at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fusedseq.nn.twins import FUSED, Fused, fused_class, plain_class, settle, stock_class


class Entry(NamedTuple):
    """One module of the model: where it is, what it was, and why it was left alone ("" if it was not)."""

    name: str
    type: str
    reason: str = ""


@dataclass
class FuseReport:
    """What `fuse` or `unfuse` did.

    `model` is the model that was passed in, whose modules have changed class in place, root included. `swapped`,
    `skipped` and `unchanged` (already what was asked for) list the modules of a kind that we have; a module that is
    reachable under several names appears once, under the first.
    """

    model: torch.nn.Module
    action: str
    swapped: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    unchanged: list[Entry] = field(default_factory=list)

    def __repr__(self) -> str:
        head = f"{self.action}: {len(self.swapped)} swapped, {len(self.skipped)} skipped"
        if self.unchanged:
            head += f", {len(self.unchanged)} as they were"
        lines = [f"  {e.name or '(root)'}: {e.type} swapped" for e in self.swapped]
        lines += [f"  {e.name or '(root)'}: {e.type} skipped, {e.reason}" for e in self.skipped]
        return "\n".join([head, *lines])


def fuse(model: torch.nn.Module) -> FuseReport:
    """Swap the modules of torch.nn in `model` that we have as well for ours, in place.

    These are RNN, LSTM, GRU and their cells, MultiheadAttention, and Transformer with its encoder, decoder and their
    layers, each looked at on its own: in a layer that is left alone the attention is still swapped.

    Only modules of exactly these classes are swapped. Subclasses, quantized and scripted modules, modules under
    FSDP and modules whose forward was replaced are left alone and reported with the reason. The parameters stay the
    same objects, so existing optimizers go on working; fusing a fused model changes nothing.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    return _walk("fuse", model, fused_class, done=lambda m: isinstance(m, Fused), bar=_why_not_fuse)


def unfuse(model: torch.nn.Module) -> FuseReport:
    """Give torch.nn's classes back to the modules of `model`, in place: before an export, for instance.

    A module that uses what torch.nn lacks (``return_cells=True``, ``reset_after=False``) and one of a subclass of ours
    are left alone and reported with the reason.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    return _walk("unfuse", model, stock_class, done=lambda m: not isinstance(m, Fused), bar=_why_not_unfuse)


def _walk(
    action: str,
    model: torch.nn.Module,
    target: Callable[[type], type | None],
    done: Callable[[torch.nn.Module], bool],
    bar: Callable[[torch.nn.Module, str], str],
) -> FuseReport:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{action} expects a torch.nn.Module, got {type(model).__name__}")
    report = FuseReport(model, action)
    for name, module, wrapper in _known(model, "", "", set()):
        entry = Entry(name, _type_name(module))
        if done(module):
            report.unchanged.append(entry)
            continue
        reason = bar(module, wrapper)
        cls = None if reason else target(type(module))
        if cls is None:
            report.skipped.append(entry._replace(reason=reason or "no class to swap it for is known"))
            continue
        module.__class__ = cls
        settle(module)
        report.swapped.append(entry)
    return report


def _known(
    module: torch.nn.Module, name: str, wrapper: str, seen: set[int]
) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """`module` and what is below it, of kinds that we have, once each, with the wrapper that owns the parameters."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if any(c.__name__ in ("FullyShardedDataParallel", "FSDPModule") for c in type(module).__mro__):
        wrapper = "FSDP"
    if _is_scripted(module) or _is_quantized(module):
        # Torch made it of one of torch.nn's; what it is made of in turn is no module that anyone wrote.
        yield name, module, wrapper
        return
    if isinstance(module, tuple(FUSED)):
        yield name, module, wrapper
    for key, child in module._modules.items():
        if child is not None:
            yield from _known(child, f"{name}.{key}" if name else key, wrapper, seen)


def _names() -> set[str]:
    return {cls.__name__ for cls in FUSED}


def _is_quantized(module: torch.nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith(("torch.ao.nn.", "torch.nn.quantiz", "torch.nn.qat")) and type(module).__name__ in _names()


def _is_scripted(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) in _names()


def _type_name(module: torch.nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"ScriptModule({module.original_name})"
    cls = plain_class(module)
    if cls in FUSED:
        return f"torch.nn.{cls.__name__}"
    return f"fusedseq.{cls.__name__}" if cls in FUSED.values() else f"{cls.__module__}.{cls.__qualname__}"


def _why_not(module: torch.nn.Module, wrapper: str) -> str:
    if wrapper:
        return f"it is under {wrapper}, which manages its parameters; swap before wrapping"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        return "its parameters are distributed tensors"
    return ""


def _why_not_fuse(module: torch.nn.Module, wrapper: str) -> str:
    if _is_scripted(module):
        return "it is compiled by TorchScript; fuse the model that it was scripted from"
    if _is_quantized(module):
        return "it is quantized, and the fused kernels take floating-point weights only"
    if fused_class(type(module)) is None and not wrapper:
        cls = plain_class(module)
        return f"{cls.__qualname__} is a subclass of {_stock_name(cls)} and may rely on what a swap would change"
    return _why_not(module, wrapper)


def _why_not_unfuse(module: torch.nn.Module, wrapper: str) -> str:
    if stock_class(type(module)) is None and not wrapper:
        cls = plain_class(module)
        return f"{cls.__qualname__} is a subclass of fusedseq's and may rely on what a swap would change"
    option = module.beyond_torch() if isinstance(module, Fused) else None
    return f"it has {option}, which torch.nn lacks" if option else _why_not(module, wrapper)


def _stock_name(cls: type) -> str:
    return next(f"torch.nn.{base.__name__}" for base in cls.__mro__ if base in FUSED)
