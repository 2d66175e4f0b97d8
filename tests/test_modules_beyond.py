"""What RNN, LSTM and GRU do beyond torch.nn: resets, lengths, cell states, the reset gate before the product."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedseq.nn as fnn

I, H, B, T = 3, 5, 4, 6
classes = pytest.mark.parametrize("cls", [fnn.RNN, fnn.LSTM, fnn.GRU])


def states(result):
    return result[1] if isinstance(result[1], tuple) else (result[1],)


@classes
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_cut_the_sequence(cls, batch_first):
    torch.manual_seed(0)
    module = cls(I, H, batch_first=batch_first)
    x = torch.randn(T, B, I)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    y, state = module(x.transpose(0, 1) if batch_first else x, resets=resets.T if batch_first else resets)
    y = y.transpose(0, 1) if batch_first else y
    parts = [module(part.transpose(0, 1) if batch_first else part) for part in (x[:3], x[3:])]
    want = torch.cat([p[0].transpose(0, 1) if batch_first else p[0] for p in parts])
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state, parts[1][1])


@classes
def test_no_gradient_passes_a_reset(cls):
    module = cls(I, H, 2)
    x = torch.randn(T, I, requires_grad=True)
    resets = torch.tensor([False, False, False, True, False, False])
    module(x, resets=resets)[0][-1].sum().backward()
    assert not x.grad[:3].any()
    assert x.grad[3:].all(dim=1).all()


@classes
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_a_packed_sequence(cls, options, batch_first):
    module = cls(I, H, batch_first=batch_first, **options)
    lengths = torch.tensor([4, 6, 1, 4])
    x = torch.randn((B, T, I) if batch_first else (T, B, I))
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    want = module(packed)
    got = module(x, lengths=lengths)
    torch.testing.assert_close(got[0], pad_packed_sequence(want[0], batch_first=batch_first)[0])
    torch.testing.assert_close(got[1], want[1])


@classes
def test_length_zero_keeps_the_state(cls):
    module = cls(I, H)
    h = torch.randn(1, 2, H)
    hx = (h, h.clone()) if cls is fnn.LSTM else h
    result = module(torch.randn(T, 2, I), hx, lengths=torch.tensor([0, 3]))
    assert not result[0][:, 0].any()
    for state in states(result):
        assert torch.equal(state[:, 0], h[:, 0])


@classes
def test_unbatched_extras(cls):
    module = cls(I, H)
    x = torch.randn(T, I)
    resets = torch.rand(T) < 0.5
    got = module(x, resets=resets, lengths=torch.tensor(4))
    assert torch.equal(got[0], module(x, resets=resets, lengths=torch.tensor([4]))[0])
    want = module(x[:4, None], resets=resets[:4, None])
    torch.testing.assert_close(got[0][:4], want[0].squeeze(1))
    torch.testing.assert_close(states(got)[0], states(want)[0].squeeze(1))


@classes
def test_resets_of_a_packed_sequence(cls):
    module = cls(I, H, 2, bidirectional=True)
    lengths = torch.tensor([4, 6, 1, 4])
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.4
    packed, packed_resets = (pack_padded_sequence(t, lengths, enforce_sorted=False) for t in (x, resets))
    want = module(x, resets=resets, lengths=lengths)
    for given in (packed_resets, packed_resets.data):
        got = module(packed, resets=given)
        torch.testing.assert_close(pad_packed_sequence(got[0])[0], want[0])
        torch.testing.assert_close(got[1], want[1])


@classes
def test_refusals_have_our_own_words(cls):
    module = cls(I, H)
    x = torch.randn(T, B, I)
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 4, 1]))
    with pytest.raises(ValueError, match="lengths"):
        module(packed, lengths=torch.tensor([1, 1, 1, 1]))
    with pytest.raises(ValueError, match="batch_sizes"):
        module(packed, resets=pack_padded_sequence(torch.zeros(T, B, dtype=torch.bool), torch.tensor([6, 5, 4, 1])))
    with pytest.raises(ValueError, match="resets"):
        module(x, resets=torch.zeros(T, B + 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="resets"):
        module(x, resets=torch.zeros(T, B))
    with pytest.raises(ValueError, match="lengths"):
        module(x, lengths=torch.tensor([T + 1, 1, 1, 1]))
    with pytest.raises(TypeError, match="lengths"):
        module(x, lengths=[1, 1, 1, 1])
    with pytest.raises(TypeError, match="resets"):
        module(x[:, 0], resets=[False] * T)
    with pytest.raises(ValueError, match="lengths"):
        module(x[:, 0], lengths=torch.tensor([1, 1]))
    with pytest.raises(TypeError):
        module(x, None, torch.zeros(T, B, dtype=torch.bool))


def test_cells_are_those_of_the_cell_module():
    lstm, cell = fnn.LSTM(I, H, return_cells=True), fnn.LSTMCell(I, H)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
    x = torch.randn(T, B, I, requires_grad=True)
    _, (_, c), cells = lstm(x)
    state, want = None, []
    for t in range(T):
        state = cell(x[t], state)
        want.append(state[1])
    torch.testing.assert_close(cells, torch.stack(want))
    assert torch.equal(cells[-1], c[0])
    weight = torch.randn_like(cells)
    got = torch.autograd.grad((cells * weight).sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad((torch.stack(want) * weight).sum(), x))


def test_cells_follow_the_layout_of_output():
    lstm = fnn.LSTM(I, H, 2, batch_first=True, bidirectional=True, proj_size=2, return_cells=True)
    x = torch.randn(B, T, I)
    assert lstm(x)[2].shape == (B, T, 2 * H)
    assert lstm(x[0])[2].shape == (T, 2 * H)
    y, _, cells = lstm(pack_padded_sequence(x, torch.tensor([4, 6, 1, 4]), batch_first=True, enforce_sorted=False))
    assert isinstance(cells, PackedSequence)
    assert torch.equal(cells.batch_sizes, y.batch_sizes)
    padded = pad_packed_sequence(cells, batch_first=True)[0]
    torch.testing.assert_close(padded, lstm(x, lengths=torch.tensor([4, 6, 1, 4]))[2])


def test_reset_before_is_the_formula_of_the_paper():
    gru, cell = fnn.GRU(I, H, reset_after=False), fnn.GRUCell(I, H, reset_after=False)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in gru.state_dict().items()})
    x, h = torch.randn(2, B, I), torch.randn(B, H)
    want = h
    for t in range(2):
        gx = x[t] @ gru.weight_ih_l0.T + gru.bias_ih_l0
        (w_r, w_z, w_n), (b_r, b_z, b_n) = gru.weight_hh_l0.chunk(3), gru.bias_hh_l0.chunk(3)
        x_r, x_z, x_n = gx.chunk(3, 1)
        r, z = torch.sigmoid(x_r + want @ w_r.T + b_r), torch.sigmoid(x_z + want @ w_z.T + b_z)
        n = torch.tanh(x_n + (r * want) @ w_n.T + b_n)
        want = (1 - z) * n + z * want
    torch.testing.assert_close(gru(x, h[None])[1][0], want)
    torch.testing.assert_close(cell(x[1], cell(x[0], h)), want)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (fnn.LSTM(I, H, return_cells=True), "return_cells=True"),
        (fnn.GRU(I, H, reset_after=False), "reset_after=False"),
        (fnn.GRUCell(I, H, reset_after=False), "reset_after=False"),
    ],
)
def test_options_are_shown_and_survive_copies(module, text):
    name = text.split("=", maxsplit=1)[0]
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other).endswith(f", {text})")
    plain = type(module)(I, H)
    assert name not in repr(plain)
    assert name not in plain.__dict__
    assert repr(plain) == repr(getattr(nn, type(module).__name__)(I, H))
