"""A call of attention made concrete: its tensors, its truth block by block, and how a function is driven through it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedseq.reference import attention as reference
from fusedseq.reference.attention import TOP_LEFT, Problem
from fusedseq.testing import attention_cases as testing
from fusedseq.testing.attention_compare import AttentionBaseline, judge_attention
from fusedseq.testing.compare import Error, _sizes

from .attention_cases import AttentionCase
from .work import Outcome, Runner, Work

Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> out
SEED = 7  # of dropout, where the results must be known
# Logits that the truth holds at once.
BLOCK = 2**22


class AttentionWork(Work):
    """With `stepwise` the yardstick is the specification with every step rounded to the dtype of the case."""

    def __init__(self, case: AttentionCase, seed: int = 0, stepwise: bool = False) -> None:
        super().__init__(case)
        self.stepwise = stepwise or case.dropout > 0  # torch's random numbers are not the specification's
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(case.device, self.dtype)

        self.q = normal(case.B, case.H, case.L, case.E)
        self.k, self.v = (normal(case.B, case.key_heads, case.keys, case.E) for _ in range(2))
        self.dout = normal(case.B, case.H, case.L, case.E)
        self.bias = normal(1, case.H, case.L, case.keys).requires_grad_(self.training) if case.bias else None
        self.key_lengths = torch.tensor(case.key_lengths(), device=case.device) if case.lengths else None
        self.global_keys = None
        if case.global_keys:
            self.global_keys = (torch.arange(case.keys, device=case.device) < case.global_keys).unsqueeze(0)
        self.problem = Problem(
            self.q, self.k, self.v, bias=None if self.bias is None else self.bias.detach(),
            key_lengths=self.key_lengths, seed=torch.tensor(SEED) if case.dropout else None,
            causal=TOP_LEFT if case.causal else 0, left=case.reach()[0] if case.window else -1,
            right=case.reach()[1] if case.causal or case.window else -1, global_keys=self.global_keys,
            scale=case.E**-0.5, dropout_p=case.dropout,
        )  # fmt: skip
        self._terms: dict[str, tuple[float, float]] = {}

    @property
    def training(self) -> bool:
        return bool(self.case.mode == "training")

    def key(self) -> Hashable:
        return self.case, self.stepwise

    @property
    def tabled(self) -> bool:
        """Whether torch's kernels need a table to say what is seen."""
        return bool(self.case.window or self.case.lengths)

    def table(self) -> Tensor:
        """Which keys a query sees, bool [L, S], or [B, 1, 1 or L, S] if batch rows differ."""
        seen = reference.visible(self.problem)
        if not self.case.lengths:
            return seen[0, 0]
        return seen if self.case.causal else seen[:, :, :1]

    def added(self) -> Tensor:
        """The table of a mask, and the bias, as they are added to logits. Differentiable if the bias is."""
        if self.bias is not None and not (self.case.causal or self.tabled):
            return self.bias
        table = self.table()
        start = torch.zeros((), dtype=self.dtype, device=table.device) if self.bias is None else self.bias
        return start.masked_fill(~table, float("-inf"))

    def truth(self) -> Outcome:
        """With dropout, that of the seed `SEED` in this project's random numbers."""
        outcome, self._terms = blocked(self.problem, self.dout, torch.float64, self.training)
        return outcome

    def yardstick(self) -> Outcome:
        """torch's own kernel, unless it is to be the specification in the dtype of the case."""
        case = self.case
        if self.stepwise:
            outcome, _ = blocked(self.problem, self.dout, self.dtype, self.training)
            return outcome
        table = self.added() if case.bias else self.table() if self.tabled else None

        def torch_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            causal, grouped = case.causal and table is None, case.key_heads != case.H
            return F.scaled_dot_product_attention(q, k, v, table, is_causal=causal, enable_gqa=grouped)

        return drive(self, torch_kernel).results()

    def errors(self, outcome: Outcome, truth: Outcome, yardstick: Outcome) -> list[Error]:
        for name, t in outcome.items():
            assert t.dtype == self.dtype, f"{name}: {t.dtype}, expected {self.dtype}"
        inputs = testing.AttentionInputs(testing.AttentionCase("B1H1L1S1E1"), self.problem, self.dout, None)
        outcome = {name: t.cpu() for name, t in outcome.items()}
        return judge_attention(outcome, AttentionBaseline(inputs, truth, yardstick, self._terms))


def without_dropout(work: AttentionWork, stepwise: bool = False) -> AttentionWork:
    """The same tensors: what a peer is judged by whose random numbers are its own."""
    return AttentionWork(work.case.but(dropout=0.0), stepwise=stepwise)


def blocked(
    p: Problem, dout: Tensor, dtype: torch.dtype, gradients: bool
) -> tuple[Outcome, dict[str, tuple[float, float]]]:
    """out, and with `gradients` dq, dk, dv and dbias, in `dtype`: the specification, some rows of a head at a time.

    Also norm and maximum of what dq, dk and dbias would be if nothing in a gradient of a logit cancelled, which the
    rule for attention's gradients goes by (`fusedseq.testing.attention_compare`). Causal, windows, key lengths, grouped
    heads, dropout, a bias [1, H, L, S].
    """
    B, H, L, _ = p.q.shape
    G, S = H // p.k.shape[1], p.k.shape[2]
    q, k, v, dout = (t.to(dtype) for t in (p.q, p.k, p.v, dout))
    out, dq, dk, dv = (torch.zeros_like(t) for t in (dout, q, k, v))
    plain_q, plain_k = torch.zeros_like(q), torch.zeros_like(k)
    bias = None if p.bias is None else p.bias.to(dtype)
    dbias, plain_bias = (None, None) if bias is None else (torch.zeros_like(bias), torch.zeros_like(bias))
    kept = reference.dropout_scale(p._replace(q=q)) if p.dropout_p else None
    for rows in torch.arange(L, device=p.q.device).split(max(1, BLOCK // (B * S))):
        seen = reference.visible(p, rows)[:, 0]
        columns = seen.any(0).any(0).nonzero()
        some = slice(int(columns[0]), int(columns[-1]) + 1)
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        hidden = ~seen[..., some]
        for h in range(H):
            g = h // G
            qh, kh, vh, doh = q[:, h, at], k[:, g, some], v[:, g, some], dout[:, h, at]
            logits = qh @ kh.mT * p.scale
            if bias is not None:
                logits = logits + bias[:, h, at, some]
            P, _ = reference._normalize(logits.masked_fill(hidden, float("-inf")), None)
            weight = P if kept is None else P * kept[:, h, at, some].to(dtype)
            out[:, h, at] = weight @ vh
            if not gradients:
                continue
            dP, D = doh @ vh.mT, (doh * out[:, h, at]).sum(-1, keepdim=True)
            dS, plain = weight * dP - P * D, weight * dP.abs() + P * D.abs()
            dq[:, h, at] = dS @ kh * p.scale
            dk[:, g, some] += dS.mT @ qh * p.scale
            dv[:, g, some] += weight.mT @ doh
            plain_q[:, h, at] = plain @ kh.abs() * p.scale
            plain_k[:, g, some] += plain.mT @ qh.abs() * p.scale
            if dbias is not None and plain_bias is not None:
                dbias[0, h, at, some] = dS.sum(0)
                plain_bias[0, h, at, some] = plain.sum(0)
    found, sizes = {"out": out}, {}
    if gradients:
        found |= {"dq": dq, "dk": dk, "dv": dv}
        sizes = {"dq": _sizes(plain_q), "dk": _sizes(plain_k)}
        if dbias is not None and plain_bias is not None:
            found["dbias"], sizes["dbias"] = dbias, _sizes(plain_bias)
    kind = dtype if dtype == torch.float64 else p.q.dtype
    return {name: t.to(kind) for name, t in found.items()}, sizes


def drive(
    work: AttentionWork, function: Function, known: Function | None = None, judged_by: AttentionWork | None = None
) -> Runner:
    """Run a function through the mode of the case.

    With `known`, results are those of that function, for the case of `judged_by` if that is another.
    """
    runner = Runner(_call(work, function), _results(_call(work, known or function)))
    return replace(runner, judged_by=judged_by)


def _results(call: Callable[[], Outcome]) -> Callable[[], Outcome]:
    return lambda: {name: t.detach() for name, t in call().items()}


def _call(work: AttentionWork, function: Function) -> Callable[[], Outcome]:
    if not work.training:

        def infer() -> Outcome:
            with torch.inference_mode():
                return {"out": function(work.q, work.k, work.v)}

        return infer
    leaves = [t.clone().requires_grad_() for t in (work.q, work.k, work.v)]
    wanted = [*leaves, *([] if work.bias is None else [work.bias])]
    names, dout = ("dq", "dk", "dv", "dbias")[: len(wanted)], work.dout

    def train() -> Outcome:
        out = function(*leaves)
        return {"out": out, **dict(zip(names, torch.autograd.grad(out, wanted, dout), strict=True))}

    return train


def make(case: AttentionCase, seed: int = 0) -> AttentionWork:
    return AttentionWork(case, seed)
