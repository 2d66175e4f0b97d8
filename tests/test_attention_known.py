"""Where attention does not keep the error rule yet. Each test fails, strictly: whoever repairs it moves it away."""

from __future__ import annotations

import pytest
import torch
from attention_formula import Call, judge, outcome

from fusedseq import registry, use_backend

pytestmark = [
    pytest.mark.skipif(registry.backends()["cpu"].missing() is not None, reason="the compiled core is not there"),
    pytest.mark.xfail(
        strict=True,
        raises=AssertionError,
        reason="backward forms logits by other sums than the forward pass of few rows; lse rounds at 1e4",
    ),
]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("L", [1, 3])
def test_dv_where_few_keys_are_seen(L: int) -> None:
    """With one key P is 1 and torch's dv is dout to the last bit; ours errs by about |logit| eps."""
    wrong = []
    for seed in range(20):
        q, k, v, dout = (normal(4, 2, L, 64, seed=4 * seed + n) for n in range(4))
        call = Call(q, k, v, {"scale": 1.0}, {"causal": "top-left"})
        with use_backend("cpu"):
            wrong += judge(call, dout, None, outcome(call, Call.ours, dout, None))
    assert not [error for error in wrong if error.startswith("dv:")], wrong


def test_gradients_at_logits_of_minus_ten_thousand() -> None:
    """Finite, and mostly within the rule, but not always: some seed is up to 1.3 times above it."""
    wrong = []
    for seed in range(8):
        q, k, v, dout = (normal(1, 2, 192, 64, seed=5 * seed + n) for n in (0, 1, 2, 4))
        mask = torch.full((192, 192), -1e4)
        mask[:96, :96] = 0
        call = Call(q, k, v, {"bias": mask})
        with use_backend("cpu"):
            wrong += judge(call, dout, None, outcome(call, Call.ours, dout, None))
    assert not wrong, wrong
