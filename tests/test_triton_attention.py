"""Attention on the Triton kernels beyond parity: what must not be read, what must not depend on what.

Without a GPU the kernels are interpreted, so the calls are small.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedseq import Mask, attention, registry, use_backend
from fusedseq.ops.attention import run
from fusedseq.reference import attention as specification
from fusedseq.testing.attention_cases import AttentionCase, make_attention
from fusedseq.testing.attention_compare import evaluate_attention

TRITON = registry.backends()["triton"]
pytestmark = pytest.mark.skipif(TRITON.missing() is not None, reason=str(TRITON.missing()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _triton() -> Any:
    with use_backend("triton"):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def qkv(B: int = 1, H: int = 2, L: int = 70, S: int = 200, E: int = 16, K: int = 0) -> tuple[Tensor, ...]:
    shapes = ((B, H, L, E), (B, K or H, S, E), (B, K or H, S, E))
    return tuple(normal(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes))


def everything(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """out, lse and the gradients of q, k and v, random gradients coming into both outputs."""
    out, lse = attention(q, k, v, return_lse=True, **options)
    upstream = [normal(*out.shape, seed=7), normal(*lse.shape, seed=8)]
    return out, lse, *torch.autograd.grad([out, lse], [q, k, v], upstream)


@pytest.mark.parametrize(
    "text",
    ["B1H1L9S5E512", "B1H1L9S5E16V257"],
)
def test_refuses_heads_that_are_too_wide(text: str) -> None:
    call = registry.attention_call(make_attention(AttentionCase(text), torch.float32, DEVICE).problem, False)
    reason = TRITON.supports(call)
    assert reason is not None and "up to 256 elements" in reason
    assert "float64" in str(TRITON.supports(call._replace(E=16, Ev=16, dtype=torch.float64)))
    assert "positions" in str(TRITON.supports(call._replace(E=16, Ev=16, S=2**31)))
    assert TRITON.supports(call._replace(E=16, Ev=16)) is None


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("mask", ["none", "packed", "global"])
def test_dropout_drops_what_the_specification_drops(p: float, mask: str) -> None:
    """With v the identity, the output is the dropped probabilities; the three masks count keys in three ways."""
    S = 150
    q, k, _ = (t.detach() for t in qkv(H=2, L=33, S=S))
    v = torch.eye(S, device=DEVICE).expand(1, 2, S, S)
    cu = torch.tensor([0, 10, 33]), torch.tensor([0, 71, S])
    table = torch.arange(S, device=DEVICE) % 3 == 0
    structure = {"none": None, "packed": Mask(cu_seqlens=cu), "global": Mask(window=(5, 5), global_tokens=table)}[mask]
    out = attention(q, k, v, mask=structure, dropout_p=p, seed=-5)
    problem = specification.Problem(q, k, v, seed=torch.tensor(-5), dropout_p=p)
    scale = specification.dropout_scale(problem)
    plain = attention(q, k, v, mask=structure)
    assert torch.equal(out != 0, (scale != 0) & (plain != 0))
    torch.testing.assert_close(out, plain * scale, rtol=1e-5, atol=1e-7)


SKIPPED: dict[str, tuple[Mask, slice, slice]] = {
    # A mask; keys that no query sees, in blocks that are not visited or behind an end; queries that see no key.
    "causal": (Mask("top-left"), slice(128, 200), slice(0, 0)),
    "bottom-right": (Mask("bottom-right", (20, None)), slice(0, 64), slice(0, 0)),
    "window": (Mask(window=(3, 9)), slice(128, 200), slice(0, 0)),
    "lengths": (Mask(key_lengths=torch.tensor([77], device=DEVICE)), slice(77, 200), slice(0, 0)),
    "packed": (
        Mask(cu_seqlens=(torch.tensor([0, 40, 61], device=DEVICE), torch.tensor([0, 30, 123], device=DEVICE))),
        slice(123, 200),
        slice(61, 70),
    ),
    "dense": (Mask(dense=torch.arange(200, device=DEVICE) < 64), slice(64, 200), slice(0, 0)),
    "global": (
        Mask("top-left", (4, None), global_tokens=torch.arange(200, device=DEVICE) % 150 == 50),
        slice(128, 200),
        slice(0, 0),
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_blocks_that_nobody_sees_are_not_read(name: str) -> None:
    """NaN there would come through: 0 times NaN is NaN."""
    mask, keys, rows = SKIPPED[name]
    clean = qkv()
    spoiled = tuple(t.detach().clone() for t in clean)
    for t in spoiled[1:]:
        t[:, :, keys] = NAN
    spoiled[0][:, :, rows] = NAN
    want = everything(*clean, mask=mask)
    got = everything(*(t.requires_grad_() for t in spoiled), mask=mask)
    for one, other in zip(want[:3], got[:3], strict=True):
        seen = one.clone()
        seen[:, :, rows] = other[:, :, rows]
        assert torch.equal(seen, other)
    for one, other in zip(want[3:], got[3:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "text",
    [
        "B2H4K2L40S70E16-causal-alibi-lse",
        "B1H2L40S70E16-left9-right5-global-dropout-bias-lse",
        "B2H8K1L1S700E16-sinks-lse",
    ],
)
def test_bitwise_the_same_again(text: str) -> None:
    inputs = make_attention(AttentionCase(text), torch.float32, DEVICE)
    first, second = evaluate_attention(run, inputs), evaluate_attention(run, inputs)
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.parametrize("text", ["B3H4K2L40S70E16-causal-alibi-lse", "B2H8K1L1S700E16-sinks-lse"])
def test_a_row_does_not_depend_on_its_batch(text: str) -> None:
    inputs = make_attention(AttentionCase(text), torch.float32, DEVICE)
    p = inputs.problem
    together = evaluate_attention(run, inputs)
    for b in range(p.q.shape[0]):
        one = inputs.to(torch.float32)
        one.problem = p._replace(q=p.q[b : b + 1], k=p.k[b : b + 1], v=p.v[b : b + 1])
        one.dout, one.dlse = inputs.dout[b : b + 1], None if inputs.dlse is None else inputs.dlse[b : b + 1]
        alone = evaluate_attention(run, one)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(alone[name][0], together[name][b]), name


@pytest.mark.parametrize("text", ["B1H4K1L3S1030E16-br-sinks-lse", "B2H2L2S700E16-lengths-left90-global-dropout"])
def test_decoding_merges_parts_of_the_keys(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedseq.backends import triton_attention

    inputs = make_attention(AttentionCase(text), torch.float32, DEVICE)
    merged: list[int] = []
    kernel = triton_attention.attention_merge_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            merged.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(triton_attention, "attention_merge_kernel", Counted())
    parts, lse = run(inputs.problem)
    assert merged == [lse.numel()]
    monkeypatch.setattr(triton_attention, "FEW_ROWS", 0)
    whole, whole_lse = run(inputs.problem)
    assert merged == [lse.numel()]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


def test_structure_equals_its_table() -> None:
    q, k, v = qkv(B=2, H=1, L=40, S=75)
    i, j = torch.arange(40, device=DEVICE)[:, None], torch.arange(75, device=DEVICE)
    lengths = torch.tensor([75, 30], device=DEVICE)
    ends = lengths[:, None, None, None]
    for mask, table in (
        (Mask("bottom-right"), j <= i + 35),
        (Mask(window=(3, 35)), (j >= i - 3) & (j <= i + 35)),
        (Mask("bottom-right", (9, -1), key_lengths=lengths), (j < ends) & (j <= i + ends - 40) & (j >= i + ends - 49)),
        (Mask(window=(2, 2), global_tokens=j % 20 == 0), ((j >= i - 2) & (j <= i + 2)) | (j % 20 == 0)),
    ):
        for a, b in zip(everything(q, k, v, mask=mask), everything(q, k, v, mask=Mask(dense=table)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_without_a_key() -> None:
    q, k, v = qkv(B=2, L=35, S=70)
    for mask in (
        Mask("bottom-right", key_lengths=torch.tensor([0, 5], device=DEVICE)),
        Mask(dense=torch.zeros(35, 70, dtype=torch.bool, device=DEVICE)),
        Mask(dense=torch.full((35, 70), -INF, device=DEVICE)),
    ):
        out, lse, *grads = everything(q, k, v, mask=mask)
        empty = lse == -INF
        assert empty[0].all() and not out[empty].any() and out.isfinite().all()
        assert all(g.isfinite().all() and not g[0].any() for g in grads)


@pytest.mark.parametrize(("where", "value"), [(0, NAN), (1, NAN), (2, NAN), (0, INF), (1, -INF), (2, INF)])
def test_what_is_not_finite_comes_through(where: int, value: float) -> None:
    tensors = [t.detach() for t in qkv(L=40, S=128)]
    tensors[where][0, 1, 5, 3] = value
    out, want = attention(*tensors), torch.nn.functional.scaled_dot_product_attention(*tensors)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())


def test_negative_scale_and_half_types() -> None:
    """The short way through 2^x takes the largest product for the largest logit, which a negative scale turns round."""
    for dtype in (torch.bfloat16, torch.float16):
        tensors = [t.detach().to(dtype) for t in qkv(L=20, S=70)]
        for scale in (-0.7, 0.0, 0.7):
            want = torch.nn.functional.scaled_dot_product_attention(*(t.float() for t in tensors), scale=scale)
            torch.testing.assert_close(attention(*tensors, scale=scale).float(), want, rtol=2e-2, atol=2e-2)


def test_strides_that_32_bits_do_not_hold() -> None:
    """A head lies 2^31 elements behind the other: addresses must be formed in 64 bits. Only touched pages are real."""
    if DEVICE != "cpu":
        pytest.skip("the tensor takes 17 GB of memory, of which a CPU makes only the touched pages real")
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = torch.empty(2**32, dtype=torch.bfloat16)
    tensors = []
    for n, small in enumerate(t.detach().bfloat16() for t in qkv(L=3, S=5, E=8)):
        wide = far.as_strided(small.shape, (1, 2**31, 8, 1), 100 * n)
        tensors.append(wide.copy_(small))
    out = attention(*tensors)
    assert torch.equal(out, attention(*(t.clone() for t in tensors)))


def test_tiles_of_every_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedseq.kernels import attention_config as config
    from fusedseq.kernels import attention_mask as bits

    monkeypatch.setattr(config, "INTERPRETING", False)
    for kernel in ("forward", "dq", "dkv", "far", "dbias"):
        for width in (16, 32, 64, 128, 256):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
                    for features in (0, bits.DROPOUT.value):
                        one = config.tile(kernel, width, dtype, capability, features, 1000)
                        assert one.BM >= 16 and one.BN >= 16 and one.warps in (4, 8)
    assert config.tile("forward", 128, torch.bfloat16, (9, 0), 0, rows=8).BM == 16
    # 64 keys at a time: else dropout would evaluate its random numbers four times as often.
    assert config.tile("dq", 256, torch.bfloat16, (9, 0), bits.DROPOUT.value, 1000).BN == 64
    assert (config.width_of(1), config.width_of(80), config.width_of(256)) == (16, 128, 256)


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one, where Triton launches what it is given."""
    from fusedseq.backends import triton_attention as module

    entered: list[torch.device] = []
    launched: list[str] = []

    @contextlib.contextmanager
    def guard(x: Tensor) -> Any:
        entered.append(x.device)
        yield
        entered.pop()

    class Watched:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            assert [device.type for device in entered] == [DEVICE], f"{self.name} without the guard"
            return self.kernel[grid]

    names = [name for name in vars(module) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(module, name, Watched(name, getattr(module, name)))
    monkeypatch.setattr(module, "on_device", guard)
    # Few rows and many keys, in parts and with a bias; then global keys, whose dk and dv take a kernel of their own.
    run_everything = (("B1H1L3S520E16-bias", torch.float32), ("B1H2L20S70E16-left9-global", torch.float32))
    for text, dtype in run_everything:
        evaluate_attention(run, make_attention(AttentionCase(text), dtype, DEVICE))
    assert set(launched) == set(names) and not entered
