"""The peers of a call of attention, each in the fastest form that its user could give it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedseq
from fusedseq import config
from fusedseq.testing.compare import HALF

from .attention_cases import AttentionCase
from .attention_work import SEED, AttentionWork, Function, drive, without_dropout
from .timing import timed
from .work import Refusal, Runner

Table = Callable[[], Tensor]  # made at every call, where a gradient goes through it

# Eager attention keeps several L x S matrices per head; beyond so many logits they fill a machine's memory.
EAGER_LOGITS = 2**28
# Calls by which the fastest form is chosen; the first is enough where it takes so many seconds.
TRIALS = 3
LONG = 0.3


def ours(work: AttentionWork) -> Runner | Refusal:
    case: AttentionCase = work.case
    window = (case.reach()[0], None if case.causal else case.reach()[1]) if case.window else None
    mask = None
    if case.causal or work.tabled:
        mask = fusedseq.Mask(
            "top-left" if case.causal else None, window, key_lengths=work.key_lengths, global_tokens=work.global_keys
        )

    def known(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seed = SEED if case.dropout else None
        return fusedseq.attention(q, k, v, mask=mask, bias=work.bias, dropout_p=case.dropout, seed=seed)

    if case.window or case.lengths or case.bias:
        return drive(work, known)
    grouped = case.key_heads != case.H

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fusedseq.scaled_dot_product_attention(q, k, v, None, case.dropout, case.causal, None, grouped)

    return drive(work, function, known if case.dropout else None)


def _around(runner: Runner, scope: Callable[[], AbstractContextManager[Any]]) -> Runner:
    """The same runner, all that it does within a scope."""

    def within(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with scope():
                return call()

        return run

    return replace(runner, call=within(runner.call), results=within(runner.results))


def triton(work: AttentionWork) -> Runner | Refusal:
    """Ours on the Triton kernels, beside whichever backend the registry takes."""
    module = fusedseq.registry.backends()["triton"]
    if work.case.device != "cuda" or (why := module.missing()) is not None:
        return Refusal("not on a CPU" if work.case.device != "cuda" else f"not usable: {why}")
    built = ours(work)
    return built if isinstance(built, Refusal) else _around(built, lambda: fusedseq.use_backend("triton"))


@contextlib.contextmanager
def _cuda_kernels(name: str) -> Iterator[None]:
    before = config.settings
    config.settings = replace(before, cuda_attention=name)
    try:
        with fusedseq.use_backend("cuda"):
            yield
    finally:
        config.settings = before


def cuda_kernels(name: str) -> Callable[[AttentionWork], Runner | Refusal]:
    """Ours on one kind of the CUDA kernels: "mma" or "hopper"; what runs on another kind is refused."""

    def build(work: AttentionWork) -> Runner | Refusal:
        if (why := fusedseq.registry.backends()["cuda"].missing()) is not None:
            return Refusal(f"not usable: {why}")
        built = ours(work)
        if isinstance(built, Refusal):
            return built
        runner = _around(built, lambda: _cuda_kernels(name))
        try:
            with fusedseq.registry.record() as ran:
                runner.call()
        except fusedseq.registry.BackendError as error:
            return Refusal(str(error))
        others = [str(one) for one in ran.kernels if one.name != name]
        return Refusal(f"not {name}: {others[0]}") if others else runner

    return build


def torch_sdpa(work: AttentionWork) -> Runner | Refusal:
    """torch.nn.functional.scaled_dot_product_attention; a window is a table, boolean or added."""
    case: AttentionCase = work.case
    tables: dict[str, Table | None] = {"": None}
    if case.bias:
        tables = {"added": work.added}
    elif work.tabled:
        seen, sums = work.table(), work.added()
        tables = {"bool": lambda: seen, "added": lambda: sums}

    def forms(dropout: float) -> dict[str, Function]:
        found: dict[str, Function] = {}
        for name, table in tables.items():
            causal = case.causal and table is None

            def form(
                q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, table: Table | None = table,
                causal: bool = causal,
            ) -> Tensor:  # fmt: skip
                grouped = q.shape[1] != k.shape[1]
                mask = table() if table and rows is None else rows
                return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)

            found[name] = form
            if case.key_heads != case.H:
                found[f"{name} repeated"] = _repeated(form)
                if not causal and not (case.bias or case.lengths):
                    found[f"{name} folded"] = _folded(form, case, table() if table else None)
        return found

    return _fastest(work, forms)


def eager(work: AttentionWork) -> Runner | Refusal:
    """Two products and a softmax; the scale in the first product or before it, masks made beforehand."""
    case: AttentionCase = work.case
    if case.B * case.H * case.L * case.keys > EAGER_LOGITS:
        return Refusal(f"over {EAGER_LOGITS} logits are more than eager attention is given memory for")
    structured, varied = case.causal or work.tabled, case.lengths or case.bias
    table = work.added() if structured and not case.bias else None

    def forms(dropout: float) -> dict[str, Function]:
        def scaled(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = table) -> Tensor:
            s = q * case.E**-0.5 @ k.mT
            added = work.added() if case.bias else table
            return _weighted(s if added is None else s + added, v, dropout)

        def fused(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = table) -> Tensor:
            a, b = q.flatten(0, 1), k.flatten(0, 1).mT
            start = a.new_empty(()).expand(a.shape[0], a.shape[1], b.shape[2]) if table is None else table
            s = torch.baddbmm(start, a, b, beta=0 if table is None else 1, alpha=case.E**-0.5)
            return _weighted(s.unflatten(0, q.shape[:2]), v, dropout)

        # Tables that differ between heads or batch rows do not fit the second form.
        found: dict[str, Function] = {"scaled": scaled} if varied else {"scaled": scaled, "fused": fused}
        if case.key_heads == case.H:
            return found
        repeated = {f"{name} repeated": _repeated(form) for name, form in found.items()}
        if varied:
            return repeated
        return repeated | {f"{name} folded": _folded(found[name], case, table) for name in ("scaled", "fused")}

    # In a half type scores and probabilities are rounded in between, which torch's kernel does not do. That is what its
    # users get, so it is no reason to leave a fast peer out: it is judged by the same steps in the same type.
    return _fastest(work, forms, stepwise=work.dtype in HALF)


def _weighted(s: Tensor, v: Tensor, dropout: float) -> Tensor:
    weights = s.softmax(-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v


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

        table = work.table() if work.tabled and not case.bias else None

        def forms(dropout: float) -> dict[str, Function]:
            def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                mask = work.added() if case.bias else table
                grouped, causal = q.shape[1] != k.shape[1], case.causal and mask is None
                with only(getattr(SDPBackend, name)):
                    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)

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
    (before, after), lengths, bias = case.reach(), work.key_lengths, work.bias

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i - j <= before) & (j - i <= after)
        if case.global_keys:
            near = near | (j < case.global_keys)
        return near if lengths is None else near & (j < lengths[b])

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if bias is None else score + bias[0, h, i, j]

    block = None
    if case.causal or work.tabled:
        rows = case.B if case.lengths else None
        block = create_block_mask(seen, rows, None, case.L, case.keys, case.device)
    score = None if bias is None else biased

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = case.key_heads != case.H
        out: Tensor = compiled(q, k, v, score_mod=score, block_mask=block, enable_gqa=grouped)
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
    "cuda-mma": cuda_kernels("mma"),
    "cuda-hopper": cuda_kernels("hopper"),
    "torch": torch_sdpa,
    "eager": eager,
    "flex": flex,
    "flash": sdpa_kernel("FLASH_ATTENTION"),
    "cudnn-attention": sdpa_kernel("CUDNN_ATTENTION"),
    "efficient": sdpa_kernel("EFFICIENT_ATTENTION"),
}
