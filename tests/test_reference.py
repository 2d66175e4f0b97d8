"""The specification itself: against torch, against its own derivative, and against what is known without either."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusedseq.reference import gru, lstm, rnn, scan
from fusedseq.testing import Case, Inputs, evaluate, make_inputs, naive_scan, torch_has, torch_scan
from fusedseq.testing.cases import CELLS, COMPACT, FULL

F64 = torch.float64
TEXTS = [text for text in (COMPACT + FULL).split() if not text.startswith("T4096")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny products: on a busy machine a second thread makes them ten times slower."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def all_cases() -> list[Case]:
    return list(dict.fromkeys(Case.parse(cell, text) for cell in CELLS for text in TEXTS))


def by_hand(inputs: Inputs) -> dict[str, Tensor]:
    """Outputs of `forward` and gradients of `backward`, named as `evaluate` names them."""
    args = (inputs.x, inputs.h0, inputs.c0, inputs.weights)
    outputs = dict(
        zip(("y", "h_n", "c_n", "c_all"), scan.forward(inputs.case.cell, *args, **inputs.keywords()), strict=True)
    )
    up = [inputs.upstream.get(name) for name in ("y", "h_n", "c_n", "c_all")]
    dx, dh0, dc0, dweights = scan.backward(inputs.case.cell, *up, *args, **inputs.keywords())
    grads = {"dx": dx, "dh0": dh0, "dc0": dc0}
    grads.update({"d" + name: dw for name, dw in zip(inputs.weight_names(), dweights, strict=True)})
    return {name: t for name, t in (outputs | grads).items() if t is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert want.keys() <= got.keys()
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", [c for c in all_cases() if torch_has(c)], ids=lambda c: c.id(F64))
def test_agrees_with_torch(case: Case) -> None:
    inputs = make_inputs(case, F64)
    assert_same(evaluate(scan.forward, inputs), evaluate(torch_scan, inputs.to(F64)))


@pytest.mark.parametrize("case", all_cases(), ids=lambda c: c.id(F64))
def test_backward_agrees_with_autograd(case: Case) -> None:
    inputs = make_inputs(case, F64)
    assert_same(by_hand(inputs), evaluate(scan.forward, inputs))


@pytest.mark.parametrize("cell", CELLS)
def test_backward_takes_none_for_zero(cell: str) -> None:
    case = Case.parse(cell, "T5B4I3H6-bi-lengths0-resets-cells")
    for only in make_inputs(case, F64).upstream:
        inputs = make_inputs(case, F64)
        want = evaluate(scan.forward, inputs, only=[only])
        inputs.upstream = {only: inputs.upstream[only]}
        assert_same(by_hand(inputs), want)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bias", [True, False])
def test_step_agrees_with_torch_cell(kind: str, bias: bool) -> None:
    options = [{"nonlinearity": "tanh"}, {"nonlinearity": "relu"}] if kind == "RNN" else [{}]
    for option in options:
        module = getattr(torch.nn, kind + "Cell")(3, 5, bias=bias, dtype=F64, **option)
        x, h, c = (torch.randn(4, n, dtype=F64) for n in (3, 5, 5))
        gx = torch.nn.functional.linear(x, module.weight_ih, module.bias_ih)
        w = (module.weight_hh, module.bias_hh)
        if kind == "LSTM":
            h_new, c_new, _ = lstm.step(gx, h, c, *w)
            want = module(x, (h, c))
            torch.testing.assert_close((h_new, c_new), want)
        elif kind == "GRU":
            torch.testing.assert_close(gru.step(gx, h, *w)[0], module(x, h))
        else:
            relu = option["nonlinearity"] == "relu"
            torch.testing.assert_close(rnn.step(gx, h, *w, relu=relu), module(x, h))


def test_reset_before_agrees_with_the_paper() -> None:
    """Written out unit by unit from equations 5 to 8 of Cho et al. (2014), with biases."""
    H, I = 3, 2
    inputs = make_inputs(Case("gru_reset_before", 1, 1, I, H), F64)
    w_ih, w_hh, b_ih, b_hh = (w.tolist() for w in inputs.weights)
    x, h = inputs.x[0, 0].tolist(), inputs.h0[0, 0].tolist()

    def gate(k: int, state: list[float]) -> list[float]:
        rows = range(k * H, (k + 1) * H)
        return [
            sum(w_ih[r][i] * x[i] for i in range(I)) + sum(w_hh[r][j] * state[j] for j in range(H)) + b_ih[r] + b_hh[r]
            for r in rows
        ]

    r, z = ([1 / (1 + math.exp(-a)) for a in gate(k, h)] for k in (0, 1))
    n = [math.tanh(a) for a in gate(2, [r[j] * h[j] for j in range(H)])]
    want = [(1 - z[j]) * n[j] + z[j] * h[j] for j in range(H)]
    y, h_n, *_ = scan.forward("gru_reset_before", inputs.x, inputs.h0, None, inputs.weights)
    assert y.flatten().tolist() == pytest.approx(want, rel=1e-12)
    assert torch.equal(y, h_n)


SMALL = {
    "plain": "T3B2I2H2",
    "packed": "T4B3I2H2-bi-packed-resets-cells",
    "lengths": "T3B3I2H3-bi-bf-lengths0-proj2-nobias-cells",
}


@pytest.mark.parametrize("text", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str, text: str) -> None:
    """Once and twice, of `forward` by autograd and of `backward`, which is what double backward goes through."""
    case = Case.parse(cell, text)
    inputs = make_inputs(case, F64)
    given = [inputs.x, inputs.h0, *([inputs.c0] if cell == "lstm" else []), *inputs.weights]
    leaves = [t.clone().requires_grad_() for t in given]

    def split(ts: tuple[Tensor, ...]) -> tuple:
        c0 = ts[2] if cell == "lstm" else None
        return ts[0], ts[1], c0, list(ts[3 if cell == "lstm" else 2 :])

    def run(*ts: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in scan.forward(cell, *split(ts), **inputs.keywords()) if t is not None)

    def run_backward(*ts: Tensor) -> tuple[Tensor, ...]:
        up = [inputs.upstream.get(name) for name in ("y", "h_n", "c_n", "c_all")]
        dx, dh0, dc0, dweights = scan.backward(cell, *up, *split(ts), **inputs.keywords())
        return tuple(t for t in (dx, dh0, dc0, *dweights) if t is not None)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(run_backward, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("cell", CELLS)
def test_half_types_compute_in_float32(cell: str, dtype: torch.dtype) -> None:
    """The half-precision result is the float32 result of the same inputs, rounded once."""
    inputs = make_inputs(Case.parse(cell, "T6B3I5H7-bi-lengths-resets-cells"), dtype)
    want = {name: t.to(dtype) for name, t in evaluate(scan.forward, inputs.to(torch.float32)).items()}
    for got in (evaluate(scan.forward, inputs), by_hand(inputs)):
        assert got["y"].dtype == got["dx"].dtype == dtype
        for name, t in want.items():
            # The two derivatives may round the last float32 bit differently, which moves a few results by one step.
            torch.testing.assert_close(got[name], t, rtol=torch.finfo(dtype).eps, atol=1e-4)
    naive = evaluate(naive_scan, inputs)
    assert not torch.equal(naive["y"], want["y"]), "the naive peer must not share the float32 inside"


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(cell: str) -> None:
    inputs = make_inputs(Case.parse(cell, "T6B4I3H5-bi-lengths0-cells"), F64)
    want = evaluate(scan.forward, inputs)
    beyond = torch.arange(6).unsqueeze(1) >= inputs.lengths
    assert not want["y"][beyond].any() and not want["dx"][beyond].any()
    inputs.x[beyond] = float("nan")
    for name in ("y", "c_all"):
        if name in inputs.upstream:
            inputs.upstream[name][beyond] = float("nan")
    assert_same(evaluate(scan.forward, inputs), want)
    assert_same(by_hand(inputs), want)


@pytest.mark.parametrize("cell", CELLS)
def test_resets_cut_the_sequence(cell: str) -> None:
    """A reset of all rows at one step makes two sequences, the second of which starts from zeros."""
    inputs = make_inputs(Case.parse(cell, "T7B3I4H5-cells"), F64)
    args = inputs.h0, inputs.c0, inputs.weights
    resets = torch.zeros(7, 3, dtype=torch.bool)
    resets[4] = True
    y, h_n, c_n, c_all = scan.forward(cell, inputs.x, *args, resets=resets, cells=True)
    first = scan.forward(cell, inputs.x[:4], *args, cells=True)
    second = scan.forward(cell, inputs.x[4:], None, None, inputs.weights, cells=True)
    torch.testing.assert_close(y, torch.cat([first[0], second[0]]))
    torch.testing.assert_close(h_n, second[1])
    if cell == "lstm":
        torch.testing.assert_close(c_n, second[2])
        torch.testing.assert_close(c_all, torch.cat([first[3], second[3]]))
    # In reverse the cut lies on the other side of the step: it zeroes what comes from step 5.
    both = [*inputs.weights, *inputs.weights]
    h0 = torch.cat([inputs.h0, inputs.h0])
    c0 = None if inputs.c0 is None else torch.cat([inputs.c0, inputs.c0])
    y = scan.forward(cell, inputs.x, h0, c0, both, bidirectional=True, resets=resets)[0].chunk(2, dim=-1)[1]
    late = scan.forward(cell, inputs.x[5:].flip(0), *args)[0].flip(0)
    early = scan.forward(cell, inputs.x[:5].flip(0), None, None, inputs.weights)[0].flip(0)
    torch.testing.assert_close(y, torch.cat([early, late]))


@pytest.mark.parametrize("case", all_cases(), ids=lambda c: c.id(F64))
def test_shapes(case: Case) -> None:
    """Every output and gradient has the shape the contract gives it, at empty sizes as well."""
    inputs = make_inputs(case, F64)
    y, h_n, c_n, c_all = scan.forward(
        case.cell, inputs.x, inputs.h0, inputs.c0, inputs.weights, **inputs.keywords()
    )  # fmt: skip
    lead = inputs.x.shape[:-1]
    assert y.shape == (*lead, case.D * case.R)
    assert h_n.shape == (case.D, case.B, case.R)
    assert (c_n is None) == (case.cell != "lstm")
    assert c_n is None or c_n.shape == (case.D, case.B, case.H)
    assert (c_all is None) == (not case.cells)
    assert c_all is None or c_all.shape == (*lead, case.D * case.H)
    up = [inputs.upstream.get(name) for name in ("y", "h_n", "c_n", "c_all")]
    dx, dh0, dc0, dweights = scan.backward(
        case.cell, *up, inputs.x, inputs.h0, inputs.c0, inputs.weights, **inputs.keywords()
    )  # fmt: skip
    assert dx.shape == inputs.x.shape
    assert dh0.shape == h_n.shape
    assert (dc0 is None) == (c_n is None) and (dc0 is None or dc0.shape == c_n.shape)
    assert [w.shape for w in dweights] == [w.shape for w in inputs.weights]
    if case.T == 0:
        assert torch.equal(h_n, torch.zeros_like(h_n) if inputs.h0 is None else inputs.h0)
        assert torch.equal(dh0, inputs.upstream["h_n"])


def test_long_linear_recurrence_in_closed_form() -> None:
    """A ReLU that never clips is linear: h_t = a^t h_0 + (1 - a^t) / (1 - a) b, over 4096 steps."""
    a, b, T = 0.999, 0.01, 4096
    one = functools.partial(torch.full, dtype=F64)
    weights = [one((1, 1), b), one((1, 1), a)]
    leaves = [t.requires_grad_() for t in (torch.ones(T, 1, 1, dtype=F64), one((1, 1, 1), 2.0), *weights)]
    y, h_n, *_ = scan.forward("rnn_relu", leaves[0], leaves[1], None, leaves[2:])
    t = torch.arange(1, T + 1, dtype=F64)
    torch.testing.assert_close(y.flatten(), a**t * 2 + (1 - a**t) / (1 - a) * b)
    dx, dh0, dw_ih, _ = torch.autograd.grad(h_n.sum(), leaves)
    torch.testing.assert_close(dh0.item(), a**T)
    torch.testing.assert_close(dx.flatten(), b * a ** (T - t))
    torch.testing.assert_close(dw_ih.item(), (1 - a**T) / (1 - a))


def test_cost_grows_linearly_with_time() -> None:
    """A derivative that fills one tensor of the whole sequence for each step would grow with the square of T."""

    def written(T: int) -> int:
        x = torch.randn(T, 1, 4, requires_grad=True)
        weights = [torch.randn(4, 4) for _ in range(2)]
        y = scan.forward("rnn_tanh", x, None, None, weights)[0]
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(y.sum(), x)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    assert written(256) < 6 * written(64)


def test_gradients_work_under_torch_func() -> None:
    """vmap and grad over the reference: per-example gradients are those of the examples alone."""
    case = Case.parse("lstm", "T3B4I2H3-bi")
    inputs = make_inputs(case, F64)

    def loss(weights: list[Tensor], x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        y, h_n, c_n, _ = scan.forward(
            "lstm", x.unsqueeze(1), h.unsqueeze(1), c.unsqueeze(1), weights, bidirectional=True
        )
        return y.square().sum() + h_n.sum() + c_n.sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 1, 1))(
        inputs.weights, inputs.x, inputs.h0, inputs.c0
    )
    for b in range(case.B):
        alone = torch.func.grad(loss)(inputs.weights, inputs.x[:, b], inputs.h0[:, b], inputs.c0[:, b])
        torch.testing.assert_close([g[b] for g in together], alone)


def test_unknown_cell_is_named() -> None:
    with pytest.raises(ValueError, match="unknown cell 'lstn': expected one of lstm, gru"):
        scan.forward("lstn", torch.zeros(1, 1, 1), None, None, [torch.zeros(4, 1)] * 2)
