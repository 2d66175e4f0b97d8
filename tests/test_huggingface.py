"""Models of transformers with attn_implementation="fusedseq" beside "eager": outputs, gradients, generated tokens."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import huggingface_models as hf
import pytest
import torch
from drop_in import Everything64, tensor

from fusedseq.interop.huggingface import masks
from fusedseq.testing.compare import judge

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64 through a whole model


def check(model, mask=None, eager_mask=None, **kwargs):
    """float64 throughout agrees to rounding; float32 by the error rule, with "eager" as the peer."""
    eager_mask = mask if eager_mask is None else eager_mask
    want = hf.truth(model, eager_mask, **kwargs)
    with Everything64():
        exact = hf.outcome(copy.deepcopy(model).double(), "fusedseq", mask, **kwargs)
    assert exact.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(exact[name], t, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    peer = hf.outcome(model, "eager", eager_mask, **kwargs)
    mine = hf.outcome(model, "fusedseq", mask, **kwargs)
    # A shift of all keys moves no softmax: the gradient of a key's bias is 0 but for rounding, which no rule can weigh.
    largest = max(t.norm() for name, t in want.items() if name != "out")
    nothing = [name for name, t in want.items() if t.norm() < 1e-12 * largest]
    assert all(name.endswith("bias") for name in nothing)
    for name in nothing:
        assert mine.pop(name).norm() < 1e-6 * largest
    want, peer = ({name: t for name, t in found.items() if name in mine} for found in (want, peer))
    wrong = [str(e) for e in judge(mine, want, peer, torch.float32, terms=hf.B * hf.L) if not e.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("padded", ["none", "right", "left"])
@pytest.mark.parametrize("name", hf.MODELS)
def test_outputs_and_gradients(name, padded):
    check(hf.made(name), hf.padding(padded))


@pytest.mark.parametrize("padded", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*hf.DECODERS, "t5"])
def test_generated_tokens(name, cache, padded):
    model = hf.made(name)
    mask = hf.padding(padded, 9)
    given = {"input_ids": hf.tokens(9), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        given["cache_implementation"] = "static"
    if mask is not None:
        given["attention_mask"] = mask
    found = []
    for implementation in ("eager", "fusedseq"):
        model.set_attn_implementation(implementation)
        found.append(model.generate(**given, output_scores=True, return_dict_in_generate=True))
    want, got = found
    assert got.sequences.tolist() == want.sequences.tolist()
    assert len({tuple(row) for row in got.sequences.tolist()}) > 1
    for mine, theirs in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "llama", "gemma2"])
def test_packed_sequences(name):
    """Position ids that begin anew, in one row (structure) and in several (a table)."""
    starts = torch.tensor([[0, 7, 8, 17], [0, 3, 11, 12], [0, 1, 2, 20]])
    positions = torch.arange(hf.L).expand(hf.B, -1).clone()
    for row, places in zip(positions, starts.tolist(), strict=True):
        for place in places:
            row[place:] = torch.arange(hf.L - place)
    model = hf.made(name)
    check(model, position_ids=positions)
    check(model, position_ids=positions[:1], ids=hf.tokens(batch=1))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_the_user(kind):
    """Four dimensions go to the model as they are."""
    model = hf.made("llama")
    seen = torch.rand(hf.B, 1, hf.L, hf.L, generator=torch.Generator().manual_seed(4)) > 0.5
    seen |= torch.eye(hf.L, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    check(model, seen if kind is torch.bool else added, added)


def test_attention_weights():
    for name in ("bert", "gemma2", "gpt_oss"):
        model, mask = hf.made(name), hf.padding("right")
        found = []
        for implementation in ("eager", "fusedseq"):
            model.set_attn_implementation(implementation)
            found.append(model(hf.tokens(), attention_mask=mask, output_attentions=True).attentions)
        want, got = found
        assert len(got) == len(want) == 2
        for mine, theirs in zip(got, want, strict=True):
            mine, theirs = (t.transpose(1, 2)[mask.bool()] for t in (mine, theirs))  # of real queries
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert not model(hf.tokens(), attention_mask=mask).get("attentions")
        with pytest.raises(ValueError, match="output_attentions"):
            model.config.output_attentions = True


def test_dropout_in_training_only():
    model = hf.made("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    model.set_attn_implementation("fusedseq")
    ids = hf.tokens()

    def run():
        torch.manual_seed(3)
        return model(ids).last_hidden_state

    still = run()
    model.train()
    noisy = run()
    assert torch.equal(run(), noisy)  # under one seed
    assert not torch.allclose(noisy, still, atol=1e-2)
    # Weights that are kept are scaled up: a layer's mean over many seeds is its output in evaluation.
    attention = model.encoder.layer[0].attention.self
    x = tensor(2, 16, 32, dtype=torch.float32)
    with torch.no_grad():
        mean = torch.stack([attention(x)[0] for _ in range(600)]).mean(0)
        want = attention.eval()(x)[0]
    assert (mean - want).norm() < 0.12 * want.norm()


def test_prompt_in_two_pieces():
    """The second piece's queries stand behind a cache of keys."""
    for name in hf.DECODERS:
        model = hf.made(name)
        ids = hf.tokens(16)
        model.set_attn_implementation("eager")
        want = model(ids).logits
        model.set_attn_implementation("fusedseq")
        first = model(ids[:, :9], use_cache=True)
        second = model(ids[:, 9:], cache=first.cache)
        got = torch.cat([first.logits, second.logits], 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bfloat16(name):
    model, mask = hf.made(name).to(torch.bfloat16), hf.padding("right")
    peer, mine = (hf.outcome(model, which, mask) for which in ("eager", "fusedseq"))
    want = hf.truth(model, mask)
    real = [n for n in want if not n.endswith("key.bias")]  # 0 but for rounding
    named = ({n: found[n] for n in real} for found in (mine, want, peer))
    wrong = [str(e) for e in judge(*named, torch.bfloat16, terms=hf.B * hf.L) if not e.ok]
    assert not wrong, "\n".join(wrong)


def test_autocast():
    model, ids, mask = hf.made("bert"), hf.tokens(), hf.padding("left")
    found = []
    for implementation in ("eager", "fusedseq"):
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()].float())
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, mask = hf.made("mistral"), hf.padding("left")
    model.train()
    want = hf.outcome(model, "fusedseq", mask)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    got = hf.outcome(model, "fusedseq", mask)
    assert got.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(got[name], t)


@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_compiled(name):
    """Whole graphs, also before any eager call; masks are tables there."""
    model = hf.made(name)
    masks._model_that_computes_itself.cache_clear()
    for padded in ("none", "left"):
        mask = hf.padding(padded)
        forward = model.forward
        model.forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
        got = hf.outcome(model, "fusedseq", mask)
        model.forward = forward
        want = hf.outcome(model, "fusedseq", mask)
        for key, t in want.items():
            torch.testing.assert_close(got[key], t, rtol=1e-3, atol=1e-3, msg=lambda m, key=key: f"{key}: {m}")
    torch._dynamo.reset()


def test_compiled_steps_with_a_static_cache():
    """One graph for the prompt, one for all steps."""
    model, ids = hf.made("llama"), hf.tokens(9)
    model.set_attn_implementation("fusedseq")
    given = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    want = model.generate(ids, **given)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, **given), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_example_of_the_documentation(capsys):
    text = (Path(__file__).parents[1] / "docs" / "huggingface.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(code, "docs/huggingface.md", "exec"), {})
    assert "torch.Size([2, 120])" in capsys.readouterr().out
