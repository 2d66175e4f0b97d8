"""When is a result right: THE tolerance of the project.

The truth is the reference in float64, on the inputs as rounded to the dtype under test. The error of a result,
`||out - truth||` and `max |out - truth|`, may be at most twice that of torch's own kernel in the same dtype, plus a
rounding floor relative to `||truth||` and `max |truth|` that grows with the logarithm of the number of terms in the
longest sum. Where torch has no such feature the peer is the reference computing step by step in that same dtype.

float32 with TF32 products is judged by the same rule, with another peer: the reference in float32 whose recurrent
products round their operands to TF32 where a kernel does (`tf32_scan`), since torch's own kernel that does so needs a
GPU. The floor remains float32's, so that nothing but those roundings is excused.

A tensor of a few elements says little about what its dtype can do: where terms cancel or a gate saturates, its one peer
may be exact by luck. If such a tensor fails, the reference in the same dtype on slightly moved inputs gives more peers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

from fusedseq.reference import scan as reference

from .cases import Case, Inputs, make_inputs, short

Outcome = dict[str, Tensor]
Scan = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]

FACTOR = 2.0
FEW = 64
# In units of the dtype's epsilon, for the norm and for the maximum. A half type rounds once at the end of a float32
# computation; the truth is itself a float64 computation, so for that dtype the floor holds the rounding of both, as
# large as a saturated gate makes it: 1 - y*y keeps few digits where y is close to 1.
FLOORS = {
    torch.float64: (256.0, 1024.0),
    torch.float32: (4.0, 8.0),
    torch.bfloat16: (0.5, 1.0),
    torch.float16: (0.5, 1.0),
}

HALF = (torch.bfloat16, torch.float16)

_TORCH_OPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
}


def torch_has(case: Case) -> bool:
    """Whether torch itself can compute the case."""
    empty = case.T == 0 or case.B == 0 or (case.I == 0 and case.layout == "lengths")
    return case.cell in _TORCH_OPS and not (empty or case.resets or case.cells or case.layout == "lengths0")


def torch_scan(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """torch's own kernels behind the signature of the scan, for the cases that `torch_has`."""
    if resets is not None or cells:
        raise NotImplementedError("torch has neither resets nor the cell states of every step")
    D = 2 if bidirectional else 1
    count = len(weights) // D
    R, H = weights[1].shape[1], weights[1].shape[0] // 4
    B = int(batch_sizes[0]) if batch_sizes is not None else x.shape[0 if batch_first else 1]
    h0 = x.new_zeros(D, B, R) if h0 is None else h0
    if cell == "lstm" and c0 is None:
        c0 = x.new_zeros(D, B, H)
    args = (list(weights), count >= 4, 1, 0.0, True, bidirectional)
    op = _TORCH_OPS[cell]

    def run(h: Tensor, c: Tensor | None, *data: Tensor, tail: tuple[bool, ...] = ()) -> tuple[Tensor, ...]:
        return op(*data, h if c is None else (h, c), *args, *tail)

    if lengths is not None:
        packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        assert order is not None and back is not None
        c0 = None if c0 is None else c0.index_select(1, order)
        y, *states = run(h0.index_select(1, order), c0, packed.data, packed.batch_sizes)
        T = x.shape[1] if batch_first else x.shape[0]
        y, _ = pad_packed_sequence(packed._replace(data=y), batch_first=batch_first, total_length=T)
        states = [s.index_select(1, back) for s in states]
    elif batch_sizes is not None:
        y, *states = run(h0, c0, x, batch_sizes)
    else:
        y, *states = run(h0, c0, x, tail=(batch_first,))
    return y, states[0], states[1] if cell == "lstm" else None, None


def naive_scan(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The reference with every operation rounded to the dtype of the inputs, float32 inside for none."""
    return reference.forward(cell, x, h0, c0, weights, compute_dtype=x.dtype, **options)


def round_tf32(t: Tensor) -> Tensor:
    """float32 rounded to the 10 bits of mantissa of TF32, to nearest, ties away from zero; still float32."""
    bits = t.detach().view(torch.int32)
    return torch.where(t.isfinite(), ((bits + 0x1000) & -0x2000).view(torch.float32), t.detach())


class _RoundedLinear(torch.autograd.Function):
    """A recurrent product of TF32 operands. Its weight gradient is another product, over all steps: not rounded."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:  # [B, K], [M, K] -> [B, M]
        ctx.save_for_backward(h, w)
        return F.linear(round_tf32(h), round_tf32(w))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        h, w = ctx.saved_tensors
        return round_tf32(grads[0]) @ round_tf32(w), grads[0].T @ h


class _RoundedProducts(TorchFunctionMode):
    """The products of a step, which are those of matrices, on operands rounded to TF32; that of all steps as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or args[0].dim() != 2:
            return func(*args, **(kwargs or {}))
        x, w, bias = (*args, None)[:3]
        product = _RoundedLinear.apply(x, w)
        return product if bias is None else product + bias


def tf32_scan(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The reference in float32, operands of the recurrent products rounded to TF32: weights, states, gate gradients."""
    with _RoundedProducts():
        return reference.forward(cell, x, h0, c0, weights, **options)


@contextlib.contextmanager
def recurrent_tf32(allowed: bool) -> Iterator[None]:
    """While the block runs, torch's setting lets recurrent layers (and convolutions) on a GPU use TF32, or not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def evaluate(scan: Scan, inputs: Inputs, only: Sequence[str] | None = None) -> Outcome:
    """Run a scan forward and backward; `only` names the outputs that receive an upstream gradient, all by default.

    The result holds every output and, with `d` before its name, the gradient of every input that was given.
    """
    named = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0}
    named.update(zip(inputs.weight_names(), inputs.weights, strict=True))
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    weights = [leaves[name] for name in inputs.weight_names()]
    results = scan(
        inputs.case.cell, leaves["x"], leaves.get("h0"), leaves.get("c0"), weights, **inputs.keywords()
    )  # fmt: skip
    named_results = zip(("y", "h_n", "c_n", "c_all"), results, strict=True)
    outputs = {name: t for name, t in named_results if t is not None}
    missing = sorted(outputs.keys() ^ inputs.upstream.keys())
    assert not missing, f"outputs that are None and should not be, or the reverse: {missing}"
    names = list(inputs.upstream) if only is None else list(only)
    # Nothing depends on anything at T = 0 or B = 0 in places, and torch then has no path to follow.
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    heads = [name for name in names if outputs[name].requires_grad]
    if heads:
        grads = torch.autograd.grad(
            [outputs[name] for name in heads],
            list(leaves.values()),
            [inputs.upstream[name] for name in heads],
            allow_unused=True,
        )
    outcome = {name: outputs[name].detach() for name in inputs.upstream}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        outcome["d" + name] = torch.zeros_like(leaf) if grad is None else grad.detach()
    return outcome


@dataclass(frozen=True)
class Error:
    """How far one tensor is from the truth, beside what is allowed; both relative to the size of the truth."""

    name: str
    norm: float
    norm_allowed: float
    max: float
    max_allowed: float

    @property
    def ok(self) -> bool:
        # Written so that NaN is never right.
        return self.norm <= self.norm_allowed and self.max <= self.max_allowed

    def __str__(self) -> str:
        return (
            f"{self.name}: norm error {self.norm:.2e} (allowed {self.norm_allowed:.2e}), "
            f"max error {self.max:.2e} (allowed {self.max_allowed:.2e})"
        )


def _sizes(t: Tensor) -> tuple[float, float]:
    return (t.norm().item(), t.abs().max().item()) if t.numel() else (0.0, 0.0)


def judge(outcome: Outcome, truth: Outcome, peer: Outcome, dtype: torch.dtype, terms: int = 1) -> list[Error]:
    """Measure every tensor of an outcome; all three must hold the same names.

    `terms` is the length of the longest sum, T*B for a weight gradient. Up to 16 terms the floor stays as it is.
    """
    if not (outcome.keys() == truth.keys() == peer.keys()):
        raise AssertionError(f"different tensors: {sorted(outcome)}, {sorted(truth)}, {sorted(peer)}")
    eps = torch.finfo(dtype).eps
    # A half type's floor is its one rounding at the end, however long the float32 sum before it.
    growth = 1.0 if dtype in HALF else max(1.0, math.log2(max(terms, 1)) / 4)
    errors = []
    for name, out in outcome.items():
        ref = truth[name]
        # Gradients are formed from a state that was itself rounded once, when it was stored.
        roundings = 2.0 if dtype in HALF and name.startswith("d") else 1.0
        floors = [floor * eps * growth * roundings for floor in FLOORS[dtype]]
        assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
        assert out.dtype == dtype, f"{name}: {out.dtype}, expected {dtype}"
        mine, theirs, scales = (_sizes(t) for t in (out.cpu().double() - ref, peer[name].double() - ref, ref))
        # A truth of zeros leaves nothing to be relative to: errors are then absolute and only the peer's are allowed.
        units = [scale or 1.0 for scale in scales]
        allowed = [
            (FACTOR * (error if math.isfinite(error) else 0.0) + floor * scale) / unit  # an overflow excuses nothing
            for error, floor, scale, unit in zip(theirs, floors, scales, units, strict=True)
        ]
        errors.append(Error(name, mine[0] / units[0], allowed[0], mine[1] / units[1], allowed[1]))
    return errors


@dataclass(frozen=True)
class Baseline:
    """All that a result of one case is compared with."""

    inputs: Inputs
    truth: Outcome
    peer: Outcome


@functools.lru_cache(maxsize=512)
def baseline(case: Case, dtype: torch.dtype, seed: int = 0, tf32: bool = False) -> Baseline:
    """Made once for all backends: truth and peer cost more than what they judge."""
    inputs = make_inputs(case, dtype, seed=seed)
    threads = torch.get_num_threads()
    # Thousands of tiny products: on a busy machine a second thread costs far more than it gives.
    torch.set_num_threads(1)
    try:
        truth = evaluate(reference.forward, inputs.to(torch.float64))
        peer = evaluate(tf32_scan if tf32 else torch_scan if torch_has(case) else naive_scan, inputs.to(dtype))
    finally:
        torch.set_num_threads(threads)
    return Baseline(inputs, truth, peer)


def _neighbours(inputs: Inputs, truth: Outcome, dtype: torch.dtype, scan: Scan) -> Outcome:
    """The largest error of each element over a few problems close to this one, each against its own truth."""
    gen = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:
        # Far enough for every rounding to fall anew, near enough to saturate and cancel alike.
        step = 0.01 * (2 * torch.rand(t.shape, generator=gen, dtype=torch.float64) - 1)
        return (t.cpu().double() * (1 + step)).to(dtype)

    errors = {name: torch.zeros_like(t) for name, t in truth.items()}
    for _ in range(4):
        other = replace(
            inputs,
            x=moved(inputs.x),
            h0=None if inputs.h0 is None else moved(inputs.h0),
            c0=None if inputs.c0 is None else moved(inputs.c0),
            weights=[moved(w) for w in inputs.weights],
            resets=None if inputs.resets is None else inputs.resets.cpu(),
            upstream={name: moved(g) for name, g in inputs.upstream.items()},
        )
        exact = evaluate(reference.forward, other.to(torch.float64))
        for name, t in evaluate(scan, other).items():
            errors[name] = torch.maximum(errors[name], (t.double() - exact[name]).abs())
    return errors


def _second_look(errors: list[Error], base: Baseline, dtype: torch.dtype, scan: Scan) -> list[Error]:
    """Judge failures on few elements again, with more peers than the one that may have been lucky."""
    small = [e for e in errors if not e.ok and base.truth[e.name].numel() <= FEW]
    if not small:
        return errors
    near = _neighbours(base.inputs, base.truth, dtype, scan)
    again = {}
    for e in small:
        norm, peak = (m / (s or 1.0) for m, s in zip(_sizes(near[e.name]), _sizes(base.truth[e.name]), strict=True))
        again[e.name] = replace(
            e, norm_allowed=max(e.norm_allowed, FACTOR * norm), max_allowed=max(e.max_allowed, FACTOR * peak)
        )  # fmt: skip
    return [again.get(e.name, e) for e in errors]


def check(
    scan: Scan,
    case: Case,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    seed: int = 0,
    tf32: bool = False,
) -> None:
    """Assert that a scan computes a case right: outputs, states and the gradient of every input.

    float32 by its own rule, or with `tf32` under the setting and by the rule of TF32 products.
    """
    base = baseline(case, dtype, seed, tf32)
    inputs = base.inputs if str(device) == "cpu" else make_inputs(case, dtype, device, seed)
    with recurrent_tf32(tf32):
        outcome = evaluate(scan, inputs)
    errors = judge(outcome, base.truth, base.peer, dtype, terms=case.T * case.B)
    near = tf32_scan if tf32 else reference.forward
    wrong = [str(e) for e in _second_look(errors, base, dtype, near) if not e.ok]
    if wrong:
        kind = "tf32" if tf32 else short(dtype)
        raise AssertionError("\n  ".join([f"{case.cell}-{kind}-{case}", *wrong]))
