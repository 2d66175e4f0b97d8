"""Our modules under what the rest of torch does to modules: scripting, tracing, compiling, changing their weights."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedseq.nn as fnn

I, H, B, T = 3, 5, 4, 6
NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
names = pytest.mark.parametrize("name", NAMES)
sequences = pytest.mark.parametrize("name", NAMES[:3])


def pair(name, **kwargs):
    made = []
    for namespace in (nn, fnn):
        torch.manual_seed(0)
        made.append(getattr(namespace, name)(I, H, **kwargs))
    return made


def weight_of(name):
    return "weight_hh" if name.endswith("Cell") else "weight_hh_l0"


def input_for(name, **kwargs):
    shape = (B, I) if name.endswith("Cell") else (T, B, I)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), **kwargs)


def first(result):
    return result[0] if isinstance(result, tuple) and not isinstance(result, PackedSequence) else result


class Net(nn.Module):
    """A model around one recurrent module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.out = nn.Linear(H, 2)

    def forward(self, x: torch.Tensor):
        y = self.inner(x)
        return self.out(y)


class SequenceNet(Net):
    def forward(self, x: torch.Tensor):
        return self.out(self.inner(x)[0])


def net_for(name, module):
    return (SequenceNet if name in ("RNN", "LSTM", "GRU", "LSTMCell") else Net)(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@names
def test_script(name):
    _, ours = pair(name)
    x = input_for(name)
    net = net_for(name, ours)
    want = net(x)
    scripted = torch.jit.script(net)
    torch.testing.assert_close(scripted(x), want)
    # The archive is made of torch.nn alone.
    assert scripted.inner.original_name == name
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), want)
    # torch.jit.script puts what it was handed into the model; the parameters are the same, and fuse brings ours back.
    assert all(a is b for a, b in zip(net.inner.parameters(), ours.parameters(), strict=True))
    assert type(ours) is getattr(fnn, name)
    fnn.fuse(net)
    assert type(net.inner) is getattr(fnn, name)
    torch.testing.assert_close(net(x), want)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_of_the_module_itself_and_of_packed_input():
    _, ours = pair("LSTM", num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(T, B, I), torch.tensor([6, 4, 4, 1]))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = ours

        def forward(self, x: PackedSequence):
            return self.lstm(x)[1]

    h, c = torch.jit.script(Model())(packed)
    want = ours(packed)[1]
    torch.testing.assert_close((h, c), want)
    assert isinstance(torch.jit.script(ours), torch.jit.ScriptModule)
    assert type(ours) is fnn.LSTM


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_refuses_what_torch_lacks():
    class Mine(fnn.GRU):
        pass

    with pytest.raises(RuntimeError, match="return_cells=True"):
        torch.jit.script(fnn.LSTM(I, H, return_cells=True))
    with pytest.raises(RuntimeError, match=r"subclass of fusedseq\.GRU"):
        torch.jit.script(Mine(I, H))


@names
def test_save_and_load(name):
    _, ours = pair(name)
    net, x = net_for(name, ours), input_for(name)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(copy.deepcopy(loaded)(x), net(x))


@names
def test_functional_call(name):
    stock, ours = pair(name)
    x = input_for(name)
    other = {k: torch.randn_like(v) for k, v in ours.named_parameters()}
    before = first(ours(x))
    torch.testing.assert_close(first(functional_call(ours, other, x)), first(functional_call(stock, other, x)))
    assert torch.equal(first(ours(x)), before)


@names
def test_per_sample_gradients(name):
    stock, ours = pair(name)
    x = input_for(name)
    dim = 0 if name.endswith("Cell") else 1

    def loss(parameters, sample):
        return first(functional_call(ours, parameters, sample.unsqueeze(dim))).square().sum()

    parameters = {k: v.detach() for k, v in ours.named_parameters()}
    got = vmap(grad(loss), (None, dim))(parameters, x)
    for b in range(B):
        stock.zero_grad()
        first(stock(x.select(dim, b).unsqueeze(dim))).square().sum().backward()
        for k, v in stock.named_parameters():
            torch.testing.assert_close(got[k][b], v.grad, rtol=1e-4, atol=1e-5)


@sequences
def test_expanded_weights(name, monkeypatch):
    # The parameters become a tensor subclass that knows torch's own functions only.
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    stock, ours = pair(name, batch_first=True)
    x = torch.randn(B, T, I)
    # torch's own rule for an LSTM does not know oneDNN's kernel.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    for module in (stock, ours):
        first(call_for_per_sample_grads(module, batch_size=B)(x)).sum().backward()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad_sample, b.grad_sample)


class Labelled(torch.Tensor):
    """A tensor subclass with the default torch function: whatever it takes part in becomes one of its kind."""


@names
def test_parameters_of_a_subclass(name):
    stock, ours = pair(name)
    for module in (stock, ours):
        for key, p in list(module.named_parameters()):
            setattr(module, key, nn.Parameter(p.detach().as_subclass(Labelled)))
    got, want = first(ours(input_for(name))), first(stock(input_for(name)))
    assert type(got) is type(want) is Labelled
    torch.testing.assert_close(got, want)


@names
def test_under_a_default_device(name):
    with torch.device("cpu"):
        _, ours = pair(name)
        assert first(ours(input_for(name))).device.type == "cpu"


def orthogonal(module, name):
    return parametrizations.orthogonal(module, name)


def old_weight_norm(module, name):
    return nn.utils.weight_norm(module, name)


def masked(module, name):
    return prune.random_unstructured(module, name, 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", [parametrizations.weight_norm, orthogonal, old_weight_norm, masked])
@names
def test_reparametrized_weights_follow_the_optimizer(name, change):
    x = input_for(name)
    results = []
    for module in pair(name):
        torch.manual_seed(2)
        change(module, weight_of(name))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            first(module(x)).square().sum().backward()
            optimizer.step()
        results.append(first(module(x)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@names
def test_reparametrizations_can_be_removed(name):
    stock, ours = pair(name)
    x, weight = input_for(name), weight_of(name)
    for module in (stock, ours):
        torch.manual_seed(2)
        masked(module, weight)
        prune.remove(module, weight)
        parametrizations.weight_norm(module, weight)
        parametrize.remove_parametrizations(module, weight)
        old_weight_norm(module, weight)
        nn.utils.remove_weight_norm(module, weight)
    # The parameter is now the last one registered, and still in its place among the weights.
    assert list(ours._parameters)[-1] == weight
    torch.testing.assert_close(first(ours(x)), first(stock(x)))


@names
def test_a_parametrization_is_computed_once_per_forward(name):
    # Spectral norm takes one step of its power iteration at every look at the weight in training.
    class Count(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return 2 * weight

    _, ours = pair(name)
    counter = Count()
    parametrize.register_parametrization(ours, weight_of(name), counter)
    counter.calls = 0
    ours(input_for(name))
    assert counter.calls == 1


@sequences
def test_weight_list_shows_reparametrized_weights(name):
    _, ours = pair(name)
    parametrizations.weight_norm(ours, "weight_hh_l0")
    assert len(ours._flat_weights) == 4
    torch.testing.assert_close(ours._flat_weights[1], ours.weight_hh_l0)
    ours.to(torch.float64)
    assert {w.dtype for w in ours._flat_weights} == {torch.float64}


@names
def test_symbolic_trace_keeps_the_module_whole(name):
    stock, ours = pair(name)
    net, x = net_for(name, ours), input_for(name)
    traced = torch.fx.symbolic_trace(net)
    want = torch.fx.symbolic_trace(net_for(name, stock))
    assert [(n.op, n.name) for n in traced.graph.nodes] == [(n.op, n.name) for n in want.graph.nodes]
    assert torch.equal(traced(x), net(x))


@sequences
def test_replicas_share_the_weights(name):
    _, ours = pair(name)
    replica = ours._replicate_for_data_parallel()
    for key, p in ours.named_parameters():
        setattr(replica, key, p * 1)
    x = input_for(name)
    torch.testing.assert_close(first(replica(x)), first(ours(x)))


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast(name, dtype):
    _, ours = pair(name)
    x = input_for(name)
    with torch.autocast("cpu", torch.bfloat16):
        got = first(ours(x.to(dtype)))
    assert got.dtype == torch.bfloat16
    got.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(got.float(), first(ours(x)), rtol=0.05, atol=0.05)


@names
def test_autocast_takes_a_state_of_either_dtype(name):
    _, ours = pair(name)
    x = input_for(name)
    shape = (B, H) if name.endswith("Cell") else (1, B, H)
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.zeros(shape, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert first(ours(x, (h, h) if name.startswith("LSTM") else h)).dtype == torch.bfloat16


@names
def test_compile_fullgraph(name):
    _, ours = pair(name)
    x = input_for(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, want = first(compiled(x)), first(ours(x))
    torch.testing.assert_close(got, want)
    got.sum().backward()
    grads = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    want.sum().backward()
    for g, p in zip(grads, ours.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)


def test_compile_breaks_at_modules_of_torch_as_before():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="RNN, GRU, or LSTM"):
        torch.compile(nn.GRU(I, H), fullgraph=True, backend="aot_eager")(torch.randn(T, B, I))


@pytest.mark.parametrize("first_import", ["torch._dynamo", "fusedseq.nn"])
def test_compile_whatever_was_imported_first(first_import):
    code = f"""
import {first_import}, sys, torch, fusedseq.nn as fnn
assert ({first_import!r} == "fusedseq.nn") == ("torch._dynamo" not in sys.modules)
model = torch.nn.Sequential(fnn.GRU(3, 4))
y, h = torch.compile(model, fullgraph=True, backend="eager")(torch.randn(5, 2, 3))
assert y.shape == (5, 2, 4)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compile_fullgraph_with_everything():
    lstm = fnn.LSTM(I, H, 2, bidirectional=True, batch_first=True, return_cells=True)
    x, resets, lengths = torch.randn(B, T, I), torch.rand(B, T) < 0.3, torch.tensor([4, 6, 1, 4])
    rows = torch.randn(4, B, H)
    torch._dynamo.reset()
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    got = compiled(x, (rows, rows), resets=resets, lengths=lengths)
    want = lstm(x, (rows, rows), resets=resets, lengths=lengths)
    torch.testing.assert_close(got, want)
