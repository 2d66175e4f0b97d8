"""Attention that repeats without gradients, as decoding does: q, k and v and nothing else, of sizes seen before.

What a first call has checked and decided is remembered by all that it depended on, so that the next one is looked up
and run. Anything else, a watched call or a registry in another state, is answered with None and goes the long way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from fusedseq import registry
from fusedseq.ops.scan import (
    _PLAIN,
    _dispatch_modes,
    _function_modes,
    _interpreters,
    _is_compiling,
    _is_grad_enabled,
    _tracing_state,
    is_autocasting,
)
from fusedseq.reference.attention import Problem

_LIMIT = 1024  # a sequence that grows is a new entry at every step
_known: dict[tuple[Any, ...], Any] = {}


def _key(p: Problem) -> tuple[Any, ...] | None:
    """All that the decision depends on; None for calls that are not remembered."""
    generation = registry.generation()
    q, k, v, a, b, c, d, e, f, g, h, seed, *numbers = p
    if generation is None or not (a is b is c is d is e is f is g is h is seed is None):
        return None
    return (generation, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.is_cpu, k.is_cpu, v.is_cpu, *numbers)


def _is_watched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if _interpreters() is not None or _dispatch_modes() or _function_modes() or _tracing_state() is not None:
        return True
    if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN:
        return True
    if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    return is_autocasting() or forward_ad._current_level >= 0


def recall(p: Problem) -> tuple[Tensor, Tensor] | None:
    """out and lse, if a call like this one has been remembered."""
    if _is_compiling() or _is_watched(p.q, p.k, p.v):
        return None
    key = _key(p)
    run = None if key is None else _known.get(key)
    return None if run is None else run(p.q, p.k, p.v)


def remember(p: Problem, backend: Any) -> None:
    """Keep what this call, which `backend` has just answered, took to decide."""
    prepare = getattr(backend, "plain_attention", None)
    if prepare is None or _is_watched(p.q, p.k, p.v):
        return
    key = _key(p)
    if key is None:
        return
    run = prepare(p)
    if run is None:
        return
    if len(_known) >= _LIMIT:
        _known.clear()
    _known[key] = run
