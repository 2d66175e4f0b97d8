"""fuse_longformer: whole models of Longformer and LED before and after the swap."""

from __future__ import annotations

import contextlib
import copy
import warnings

import huggingface_models as hf
import pytest
import torch
import transformers
from drop_in import EXACT, Everything64, tensor

from fusedseq.interop.huggingface import fuse_longformer
from fusedseq.testing.compare import judge

W = 8
SIZES = {
    "vocab_size": hf.VOCABULARY, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3,
    "pad_token_id": 0, "max_position_embeddings": 80, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip


def made():
    """Three layers, each with a window of its own."""
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**SIZES, num_hidden_layers=3, attention_window=[W, 4, W])
    return hf.vary(transformers.LongformerModel(config)).double()


def masks(length, padded, marked):
    mask = hf.padding(padded, length)
    glob = torch.zeros(hf.B, length, dtype=torch.long)
    if marked:
        glob[0, [0, length // 2]] = glob[2, length - 1] = 1  # of the last row's real or padded token; row 1 has none
    return {"attention_mask": mask, "global_attention_mask": glob if marked else None}


def outcome(model, inputs, keep):
    dtype = next(model.parameters()).dtype
    x = tensor(hf.B, keep.shape[1], 24, dtype=dtype).requires_grad_()
    model.zero_grad()
    # transformers takes Longformer's softmax in float32 whatever the dtype of the model.
    with Everything64() if dtype is torch.float64 else contextlib.nullcontext():
        out = model(inputs_embeds=x, **inputs).last_hidden_state[keep]
    (out * tensor(*out.shape, seed=4, dtype=out.dtype)).sum().backward()
    named = {f"d{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad, **named}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("padded", ["none", "right", "left"])
@pytest.mark.parametrize("length", [3 * W, 3 * W + 3])
def test_longformer(length, padded, marked):
    """Lengths that are no multiple of the window are padded by the model itself."""
    model, inputs = made(), masks(length, padded, marked)
    keep = torch.ones(hf.B, length, dtype=torch.bool) if padded == "none" else inputs["attention_mask"].bool()
    want = outcome(model, inputs, keep)
    # The swap keeps every object, so what was handed out before stays valid.
    before, names = list(model.parameters()), list(model.state_dict())
    report = fuse_longformer(model)
    assert [e.name for e in report.swapped] == [f"encoder.layer.{i}.attention.self" for i in range(3)]
    assert not report.skipped and not fuse_longformer(model).swapped
    assert list(model.state_dict()) == names
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    got = outcome(model, inputs, keep)
    assert got.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_longformer_in_float32_by_the_rule():
    inputs = masks(3 * W + 3, "right", True)
    keep = inputs["attention_mask"].bool()
    model = made()
    truth = outcome(model, inputs, keep)
    stock = model.float()
    peer = outcome(stock, inputs, keep)
    fuse_longformer(stock)
    mine = outcome(stock, inputs, keep)
    # A shift of all keys moves no softmax: these gradients are 0 but for rounding.
    real = [name for name in truth if not name.endswith((".key.bias", ".key_global.bias"))]
    named = ({name: found[name] for name in real} for found in (mine, truth, peer))
    wrong = [str(e) for e in judge(*named, torch.float32, terms=hf.B * keep.shape[1]) if not e.ok]
    assert not wrong, "\n".join(wrong)


def test_padded_rows_are_zero_in_both():
    model, inputs = made().eval(), masks(3 * W, "right", True)
    layer, hidden = model.encoder.layer[0].attention.self, tensor(hf.B, 3 * W, 24)
    masked = ~inputs["attention_mask"].bool()
    given = (torch.where(masked, -1e4, 0.0).double(), masked, torch.zeros_like(masked), False)
    with Everything64():
        want = layer(hidden, *given)[0]
    fuse_longformer(model)
    torch.testing.assert_close(layer(hidden, *given)[0], want, **EXACT)
    torch.testing.assert_close(layer(hidden, given[0])[0], want, **EXACT)  # booleans are read from the numbers
    assert want[masked].eq(0).all()


def test_led():
    torch.manual_seed(0)
    config = transformers.LEDConfig(
        vocab_size=hf.VOCABULARY, d_model=24, encoder_layers=2, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20, attention_window=W, dropout=0.0,
        max_encoder_position_embeddings=80, max_decoder_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    model = hf.vary(transformers.LEDForConditionalGeneration(config)).double().eval()
    ids, mask = hf.tokens(3 * W + 3), hf.padding("right", 3 * W + 3)
    glob = torch.zeros_like(ids)
    glob[:, 0] = 1
    given = {"attention_mask": mask, "global_attention_mask": glob}
    decoder = {"decoder_input_ids": hf.tokens(5, seed=3)}

    def run():
        model.zero_grad()
        with Everything64():
            out = model(ids, **given, **decoder).logits
            written = model.generate(ids, **given, max_new_tokens=6, do_sample=False, num_beams=1)
        out.square().sum().backward()
        return out.detach(), model.get_input_embeddings().weight.grad.clone(), written

    want = run()
    assert len(fuse_longformer(model).swapped) == 2
    for mine, theirs in zip(run(), want, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_attention_weights_and_training():
    model, inputs = made().eval(), masks(3 * W, "none", True)
    ids = hf.tokens(3 * W)
    with Everything64():
        want = model(ids, output_attentions=True, **inputs)
    fuse_longformer(model)
    with Everything64(), pytest.warns(UserWarning, match="output_attentions=True: transformers' own"):
        got = model(ids, output_attentions=True, **inputs)
    found, expected = (o.attentions + o.global_attentions for o in (got, want))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        still = model(ids, **inputs).last_hidden_state
        for layer in model.encoder.layer:
            layer.attention.self.dropout = 0.5
        torch.testing.assert_close(model(ids, **inputs).last_hidden_state, still, rtol=0, atol=0)
        assert not torch.allclose(model.train()(ids, **inputs).last_hidden_state, still)


def test_what_is_left_alone():
    class Mine(type(made().encoder.layer[0].attention.self)):
        pass

    model = made()
    layers = model.encoder.layer
    layers[0].attention.self.__class__ = Mine
    layers[1].attention.self.forward = layers[1].attention.self.forward
    report = fuse_longformer(model)
    assert [e.reason.split(" ")[:4] for e in report.skipped] == [
        ["it", "is", "of", "a"], ["its", "forward", "was", "replaced"],
    ]  # fmt: skip
    assert [e.name for e in report.swapped] == ["encoder.layer.2.attention.self"]
    assert "fuse_longformer: 1 swapped, 2 skipped" in repr(report)
    assert copy.deepcopy(model).encoder.layer[2].attention.self.__class__ is layers[2].attention.self.__class__
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module"):
        fuse_longformer("model")
