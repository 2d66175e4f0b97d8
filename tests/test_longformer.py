"""LongformerSelfAttention against a dense construction in float64, and against Hugging Face's where it is installed."""

from __future__ import annotations

import pytest
import torch
from drop_in import EXACT, Everything64, tensor

import fusedseq

B, L, E, H, W = 3, 17, 12, 3, 4


def made(**kwargs):
    torch.manual_seed(0)
    return fusedseq.LongformerSelfAttention(E, H, W, **{"dtype": torch.float64, **kwargs})


def masks(padded, marked):
    padding = torch.arange(L) >= torch.tensor([[L], [11], [14]])
    padding = {"none": None, "right": padding, "left": padding.flip(1)}[padded]
    glob = None
    if marked != "none":
        glob = torch.zeros(B, L, dtype=torch.bool)
        glob[0, [0, 7]] = glob[1, 5] = True  # row 2 has none
        if marked == "padded":
            glob[1, -1] = glob[1, 0] = True
    return padding, glob


def dense(module, x, padding, glob):
    """Every row with every key: both kinds of scores in full, then the mask."""
    hidden = torch.zeros(B, L, dtype=torch.bool) if padding is None else padding
    glob = torch.zeros(B, L, dtype=torch.bool) if glob is None else glob & ~hidden
    i = torch.arange(L)
    near = (i[:, None] - i).abs() <= W // 2

    def attend(names, seen):
        q, k, v = (getattr(module, n)(x).view(B, L, H, E // H).transpose(1, 2) for n in names)
        scores = (q @ k.transpose(2, 3) / (E // H) ** 0.5).masked_fill(~seen[:, None], float("-inf"))
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(B, L, E)

    seen = (near | glob[:, None]) & ~hidden[:, None]
    seen = seen | hidden[:, :, None]  # padded rows are dropped below; let their softmax be finite
    local = attend(("query", "key", "value"), seen)
    everything = attend(("query_global", "key_global", "value_global"), (~hidden[:, None]).expand(B, L, L))
    return torch.where(glob[..., None], everything, local).masked_fill(hidden[..., None], 0.0)


@pytest.mark.parametrize("padded", ["none", "right", "left"])
@pytest.mark.parametrize("marked", ["none", "some", "padded"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients(padded, marked, bias):
    module = made(bias=bias)
    padding, glob = masks(padded, marked)
    x = tensor(B, L, E).requires_grad_()
    up = tensor(B, L, E, seed=2)
    got, want = module(x, padding, glob), dense(module, x, padding, glob)
    torch.testing.assert_close(got, want, **EXACT)
    wrt = [x, *module.parameters()]
    grads = [torch.autograd.grad((out * up).sum(), wrt, allow_unused=True) for out in (got, want)]
    for mine, theirs, t in zip(*grads, wrt, strict=True):
        zero = torch.zeros_like(t)
        torch.testing.assert_close(zero if mine is None else mine, zero if theirs is None else theirs, **EXACT)
    assert (grads[0][-2] is None) == (marked == "none")


def test_dropout_and_empty_batch():
    module = made(dropout=1.0)
    _, glob = masks("none", "some")
    x = tensor(B, L, E)
    assert module(x, None, glob).eq(0).all()
    torch.testing.assert_close(module.eval()(x, None, glob), dense(module, x, None, glob), **EXACT)
    assert module(x[:0], None, glob[:0]).shape == (0, L, E)
    torch.testing.assert_close(module(x, None, torch.zeros_like(glob)), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("args", "text"),
    [((12, 5, 4), "must divide"), ((12, 3, 3), "even and positive"), ((12, 3, 0), "even and positive")],
)
def test_construction_errors(args, text):
    with pytest.raises(ValueError, match=text):
        fusedseq.LongformerSelfAttention(*args)


def test_call_errors():
    module = made()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, L, 12\)"):
        module(tensor(L, E))
    with pytest.raises(ValueError, match="global_mask: expected bool"):
        module(tensor(B, L, E), None, torch.zeros(B, L))
    with pytest.raises(ValueError, match="key_padding_mask: expected bool"):
        module(tensor(B, L, E), torch.zeros(B, L - 1, dtype=torch.bool))


def test_weights_of_hugging_face():
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer", reason="needs transformers")
    config = longformer.LongformerConfig(
        hidden_size=E, num_attention_heads=H, attention_window=[W], attention_probs_dropout_prob=0.0
    )
    theirs = longformer.LongformerSelfAttention(config, 0).double().eval()
    ours = made()
    ours.load_state_dict(theirs.state_dict())
    length = 4 * W  # theirs takes multiples of the window
    padding, glob = (m[:, :length] for m in masks("right", "some"))
    x = tensor(B, length, E)
    with Everything64():  # theirs takes the softmax in float32
        want = theirs(
            x, attention_mask=torch.where(padding, -10000.0, glob * 10000.0), is_index_masked=padding,
            is_index_global_attn=glob, is_global_attn=True,
        )[0]  # fmt: skip
    torch.testing.assert_close(ours(x, padding, glob), want, **EXACT)
