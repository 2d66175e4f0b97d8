"""The peers of a call of attention, each in the fastest form that its user could give it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedseq
from fusedseq.testing.compare import HALF

from .attention_cases import AttentionCase
from .attention_work import SEED, AttentionWork, Function, drive, without_dropout
from .timing import timed
from .work import Refusal, Runner

# Eager attention keeps several L x S matrices per head; beyond so many logits they fill a machine's memory.
EAGER_LOGITS = 2**28
# Calls by which the fastest form is chosen; the first is enough where it takes so many seconds.
TRIALS = 3
LONG = 0.3


def ours(work: AttentionWork) -> Runner | Refusal:
    case: AttentionCase = work.case
    window = (case.window - 1, None) if case.window else None
    mask = fusedseq.Mask("top-left", window) if case.causal else None

    def known(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seed = SEED if case.dropout else None
        return fusedseq.attention(q, k, v, mask=mask, dropout_p=case.dropout, seed=seed)

    if case.window:
        return drive(work, known)
    grouped = case.key_heads != case.H

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fusedseq.scaled_dot_product_attention(q, k, v, None, case.dropout, case.causal, None, grouped)

    return drive(work, function, known if case.dropout else None)


def triton(work: AttentionWork) -> Runner | Refusal:
    """Ours on the Triton kernels, beside whichever backend the registry takes."""
    module = fusedseq.registry.backends()["triton"]
    if work.case.device != "cuda" or (why := module.missing()) is not None:
        return Refusal("not on a CPU" if work.case.device != "cuda" else f"not usable: {why}")
    built = ours(work)
    if isinstance(built, Refusal):
        return built

    def named(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with fusedseq.use_backend("triton"):
                return call()

        return run

    return replace(built, call=named(built.call), results=named(built.results))


def torch_sdpa(work: AttentionWork) -> Runner | Refusal:
    """torch.nn.functional.scaled_dot_product_attention; a window is a table, boolean or added."""
    case: AttentionCase = work.case
    tables: dict[str, Tensor | None] = {"": None}
    if case.window:
        tables = {"bool": work.table(), "added": _added(work)}

    def forms(dropout: float) -> dict[str, Function]:
        found: dict[str, Function] = {}
        for name, table in tables.items():
            causal = case.causal and table is None

            def form(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = table, causal: bool = causal) -> Tensor:
                grouped = q.shape[1] != k.shape[1]
                return F.scaled_dot_product_attention(q, k, v, table, dropout, causal, enable_gqa=grouped)

            found[name] = form
            if case.key_heads != case.H:
                found[f"{name} repeated"] = _repeated(form)
                if not causal:
                    found[f"{name} folded"] = _folded(form, case, table)
        return found

    return _fastest(work, forms)


def eager(work: AttentionWork) -> Runner | Refusal:
    """Two products and a softmax; the scale in the first product or before it, masks made beforehand."""
    case: AttentionCase = work.case
    if case.B * case.H * case.L * case.keys > EAGER_LOGITS:
        return Refusal(f"over {EAGER_LOGITS} logits are more than eager attention is given memory for")
    table = _added(work) if case.causal else None

    def forms(dropout: float) -> dict[str, Function]:
        def scaled(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = table) -> Tensor:
            s = q * case.E**-0.5 @ k.mT
            return _weighted(s if table is None else s + table, v, dropout)

        def fused(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = table) -> Tensor:
            a, b = q.flatten(0, 1), k.flatten(0, 1).mT
            start = a.new_empty(()).expand(a.shape[0], a.shape[1], b.shape[2]) if table is None else table
            s = torch.baddbmm(start, a, b, beta=0 if table is None else 1, alpha=case.E**-0.5)
            return _weighted(s.unflatten(0, q.shape[:2]), v, dropout)

        found: dict[str, Function] = {"scaled": scaled, "fused": fused}
        if case.key_heads == case.H:
            return found
        found |= {f"{name} repeated": _repeated(form) for name, form in found.items()}
        found |= {f"{name} folded": _folded(found[name], case, table) for name in ("scaled", "fused")}
        return {name: form for name, form in found.items() if " " in name}

    # In a half type scores and probabilities are rounded in between, which torch's kernel does not do. That is what its
    # users get, so it is no reason to leave a fast peer out: it is judged by the same steps in the same type.
    return _fastest(work, forms, stepwise=work.dtype in HALF)


def _weighted(s: Tensor, v: Tensor, dropout: float) -> Tensor:
    weights = s.softmax(-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v


def _added(work: AttentionWork) -> Tensor:
    """The table of a mask as it is added to logits, [L, S]."""
    table = work.table()
    return torch.zeros(table.shape, dtype=work.dtype, device=table.device).masked_fill(~table, float("-inf"))


def _repeated(form: Function) -> Function:
    """Grouped heads with keys and values copied for each query head."""

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        G = q.shape[1] // k.shape[1]
        return form(q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1))

    return repeated


def _folded(form: Callable[..., Tensor], case: AttentionCase, table: Tensor | None) -> Function:
    """Grouped heads as one key head with the queries of all, head by head."""
    G = case.H // case.key_heads
    rows = None if table is None else table.repeat(G, 1)

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return form(q.reshape(case.B, case.key_heads, G * case.L, case.E), k, v, rows).reshape(q.shape)

    return folded


def _fastest(work: AttentionWork, forms: Callable[[float], Mapping[str, Function]], stepwise: bool = False) -> Runner:
    """The fastest of several forms, by a trial. Results are compared without dropout, by the same form."""
    case = work.case
    made = forms(case.dropout)
    name = next(iter(made))
    if len(made) > 1 and not work.untried:
        finish = torch.cuda.synchronize if case.device == "cuda" else None
        seconds = {one: _trial(drive(work, form).call, finish) for one, form in made.items()}
        name = min(seconds, key=seconds.__getitem__)
    if not (case.dropout or stepwise):
        return drive(work, made[name])
    return drive(work, made[name], forms(0.0)[name], without_dropout(work, stepwise))


def _trial(call: Callable[[], object], finish: Callable[[], object] | None) -> float:
    first = timed(call, 1, finish)
    return first if first > LONG else min(timed(call, 1, finish) for _ in range(TRIALS))


def sdpa_kernel(name: str) -> Callable[[AttentionWork], Runner | Refusal]:
    """One of the kernels that torch.nn.functional.scaled_dot_product_attention chooses among on a GPU."""

    def build(work: AttentionWork) -> Runner | Refusal:
        case: AttentionCase = work.case
        if case.device != "cuda":
            return Refusal("torch has this kernel for GPUs only")
        from torch.nn.attention import SDPBackend
        from torch.nn.attention import sdpa_kernel as only

        table = work.table() if case.window else None

        def forms(dropout: float) -> dict[str, Function]:
            def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                grouped, causal = q.shape[1] != k.shape[1], case.causal and table is None
                with only(getattr(SDPBackend, name)):
                    return F.scaled_dot_product_attention(q, k, v, table, dropout, causal, enable_gqa=grouped)

            return {name: form}

        runner = _fastest(work, forms)
        try:
            runner.call()
        except RuntimeError as error:
            return Refusal(f"{name}: {str(error).splitlines()[0]}")
        return runner

    return build


def flex(work: AttentionWork) -> Runner | Refusal:
    """torch.compile of FlexAttention; a mask is a block mask, whose empty blocks are skipped."""
    case: AttentionCase = work.case
    if case.dropout:
        return Refusal("FlexAttention has no dropout")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    reach = case.window or case.keys

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < reach)

    block = create_block_mask(seen, None, None, case.L, case.keys, case.device) if case.causal else None

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=block, enable_gqa=case.key_heads != case.H)
        return out

    runner = drive(work, function)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what the compiler would rather be given
            runner.call()
    except Exception as error:
        return Refusal(f"FlexAttention, compiled: {type(error).__name__}: {str(error).splitlines()[0]}")
    return runner


BUILD: dict[str, Callable[[AttentionWork], Runner | Refusal]] = {
    "fusedseq": ours,
    "triton": triton,
    "torch": torch_sdpa,
    "eager": eager,
    "flex": flex,
    "flash": sdpa_kernel("FLASH_ATTENTION"),
    "cudnn-attention": sdpa_kernel("CUDNN_ATTENTION"),
    "efficient": sdpa_kernel("EFFICIENT_ATTENTION"),
}
