"""The mask function: structure where a Mask can say it, and always the table that transformers itself would make."""

from __future__ import annotations

import huggingface_models as hf
import pytest
import torch
import transformers
from drop_in import tensor
from transformers import masking_utils as theirs

import fusedseq
from fusedseq.interop.huggingface import attention_forward, attention_mask, register
from fusedseq.interop.huggingface.lazy import AttentionMask

B = 3
PATTERNS = {
    "causal": theirs.causal_mask_function,
    "both": theirs.bidirectional_mask_function,
    "window": theirs.sliding_window_causal_mask_function(4),
    "window_wide": theirs.sliding_window_causal_mask_function(50),
    "window_both": theirs.sliding_window_bidirectional_mask_function(3),
    "window_both_wide": theirs.sliding_window_bidirectional_mask_function(50),
    "two_windows": theirs.and_masks(theirs.sliding_window_overlay(6), theirs.sliding_window_causal_mask_function(4)),
}
# name: q_length, kv_length, q_offset, kv_offset
PLACES = {
    "square": (9, 9, 0, 0),
    "decoding": (1, 12, 11, 0),
    "second_piece": (4, 12, 8, 0),
    "static_prompt": (5, 16, 0, 0),
    "static_piece": (3, 16, 6, 0),
    "static_decoding": (1, 16, 6, 0),
    "window_full": (1, 4, 20, 17),
    "window_prompt": (5, 8, 20, 17),
    "beyond_the_keys": (4, 6, 8, 0),
    "keys_ahead": (4, 12, 0, 3),
    "cross": (5, 11, 0, 0),
}
PADDING = ("none", "all", "right", "left", "holes", "short")


def padded(kind, length):
    lengths = torch.tensor([[length], [max(length - 3, 1)], [max(length - 1, 1)]])
    right = torch.arange(length) < lengths
    return {
        "none": None, "all": torch.ones(B, length, dtype=torch.bool), "right": right, "left": right.flip(1),
        "holes": torch.rand(B, length, generator=torch.Generator().manual_seed(1)) > 0.4,
        "short": right[:, : max(length - 4, 1)],
    }[kind]  # fmt: skip


def both(pattern, place, padding=None, batch=B, **kwargs):
    """Our mask, and the table that transformers makes of the same arguments."""
    q_length, kv_length, q_offset, kv_offset = place
    given = {
        "batch_size": batch, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": pattern, "attention_mask": padding, **kwargs,
    }  # fmt: skip
    table = theirs.sdpa_mask(**{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return attention_mask(**given), table.expand(batch, -1, q_length, kv_length)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_table(pattern, place):
    for padding in PADDING:
        _, kv_length, q_offset, kv_offset = PLACES[place]
        offset = torch.tensor(q_offset) if place.startswith("static") else q_offset
        place_now = (*PLACES[place][:2], offset, kv_offset)
        mask, want = both(PATTERNS[pattern], place_now, padded(padding, kv_length + kv_offset))
        assert isinstance(mask, AttentionMask)
        assert mask.shape == want.shape
        assert torch.equal(mask.table(), want), (padding, mask)
        # The kernel reads the structure as the table does.
        q, k = tensor(B, 2, want.shape[2], 8), tensor(B, 2, want.shape[3], 8, seed=2)
        got = fusedseq.attention(q, k, k, mask=mask.mask())
        torch.testing.assert_close(got, fusedseq.attention(q, k, k, mask=fusedseq.Mask(dense=want)))


@pytest.mark.parametrize(
    ("pattern", "place", "padding", "said"),
    [
        ("causal", "square", "none", "Mask(causal='top-left')"),
        ("causal", "square", "all", "Mask(causal='top-left')"),
        ("causal", "square", "right", "Mask(causal='top-left', key_lengths='<(3,)>')"),
        ("causal", "square", "left", "Mask(causal='top-left', dense='<(3, 1, 1, 9)>')"),
        ("causal", "second_piece", "none", "Mask(causal='bottom-right')"),
        ("causal", "decoding", "all", "Mask()"),
        ("causal", "static_piece", "none", "Mask(causal='bottom-right', key_lengths='<(3,)>')"),
        ("causal", "static_prompt", "none", "Mask(causal='top-left')"),
        ("window", "square", "none", "Mask(causal='top-left', window=(3, None))"),
        ("window", "second_piece", "left", "Mask(causal='bottom-right', window=(3, None), dense='<(3, 1, 1, 12)>')"),
        ("window_wide", "square", "none", "Mask(causal='top-left')"),
        ("window", "window_full", "none", "Mask()"),
        ("window_both", "square", "right", "Mask(window=(3, 3), key_lengths='<(3,)>')"),
        ("both", "cross", "right", "Mask(key_lengths='<(3,)>')"),
        ("both", "square", "none", "Mask()"),
    ],
)
def test_structure(pattern, place, padding, said):
    """What keeps the kernels from computing blocks that nobody sees; nothing of size L x S."""
    mask, _ = both(PATTERNS[pattern], PLACES[place], padded(padding, PLACES[place][1]))
    assert repr(mask.structure) == said


def test_packed_rows():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 5, 6, 7, 8]])
    for base in (theirs.causal_mask_function, theirs.sliding_window_causal_mask_function(2)):
        remapped = theirs.remap_positions_for_packed_sequence(base, positions)
        pattern = theirs.and_masks(remapped, theirs.packed_sequence_mask_function(ids))
        mask, want = both(pattern, (9, 9, 0, 0), batch=1)
        assert mask.structure.cu_seqlens.tolist() == [0, 3, 5, 9]
        assert torch.equal(mask.table(), want)
        # Positions that do not run on within a sequence compare otherwise than places do.
        skewed = theirs.remap_positions_for_packed_sequence(base, positions.flip(1))
        pattern = theirs.and_masks(skewed, theirs.packed_sequence_mask_function(ids))
        mask, want = both(pattern, (9, 9, 0, 0), batch=1)
        assert mask.structure is None
        assert torch.equal(mask.table(), want)


def test_unknown_functions_become_tables():
    def odd(batch, head, q, k):
        return (q + k) % 2 == 0

    left = torch.tensor([0, 2, 1])
    for pattern, vmap in (
        (odd, False), (odd, True), (theirs.and_masks(theirs.causal_mask_function, odd), False),
        (theirs.or_masks(theirs.causal_mask_function, odd), True),
        (theirs.chunked_causal_mask_function(4, left), False),
        (theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(torch.zeros(B, 9).long())), False),
        (theirs.add_offsets_to_mask_function(theirs.causal_mask_function, 1, 0), False),
        (theirs.sliding_window_causal_mask_function(0), False),
    ):  # fmt: skip
        for padding in ("none", "right", "left"):
            mask, want = both(pattern, (9, 9, 0, 0), padded(padding, 9), use_vmap=vmap)
            assert mask.structure is None
            assert torch.equal(mask.table(), want)


def test_a_mask_is_a_tensor_to_others():
    mask, want = both(PATTERNS["window"], (9, 9, 0, 0), padded("left", 9))
    for use in (
        lambda m: m[:, :, 2:5], lambda m: m & ~m.transpose(2, 3), lambda m: torch.where(m, 0.0, -1.0),
        lambda m: m.repeat_interleave(2, 0), lambda m: m.sum(-1), lambda m: torch.cat([m, m], -1), lambda m: m.float(),
        lambda m: m.clone(), lambda m: m.any().item(),
        lambda m: m[1, 0, 2, 1].item(), lambda m: m.to("cpu", torch.int64),
        lambda m: m.all(),
    ):  # fmt: skip
        got = use(mask)
        got = got.table() if isinstance(got, AttentionMask) else got
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(use(want)))
    assert mask.detach().structure is mask.structure
    assert isinstance(mask[:, :, 2:5], AttentionMask) and mask[:, :, 2:5].structure is None
    assert "Mask(causal='top-left'" in repr(mask)
    scores = torch.randn(B, 2, 9, 9)
    for wrong in (lambda: scores + mask, lambda: mask[:, :, :, :9] + scores, lambda: scores.clone().add_(mask)):
        with pytest.raises(RuntimeError, match="attention_mask: expected to be handed to the attention function"):
            wrong()
    with pytest.raises(RuntimeError, match="expected no write in place"):
        mask[0, 0, 3] = False
    with pytest.raises(RuntimeError, match="expected no write in place"):
        mask[0, 0, 3, 3].fill_(False)


def test_models_that_compute_attention_themselves():
    """Without our refusal they would add booleans to their scores."""
    ids, mask = hf.tokens(8), hf.padding("right", 8 + 4)[:, :8]
    bloom = transformers.BloomConfig(vocab_size=hf.VOCABULARY, hidden_size=16, n_layer=1, n_head=2)
    longformer = transformers.LongformerConfig(
        vocab_size=hf.VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        attention_window=4,
    )  # fmt: skip
    for config, text in ((bloom, "BloomP.*computes attention by itself"), (longformer, "fuse_longformer")):
        model = transformers.AutoModel.from_config(config, attn_implementation="fusedseq")
        with pytest.raises(ValueError, match=text):
            model(ids, attention_mask=mask)


def test_arguments_that_are_not_known():
    q = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    for name in ("indices", "block_indices", "sinks", "block_table"):
        with pytest.raises(ValueError, match=f"{name}: expected None"):
            attention_forward(module, q, q, q, None, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected a mask or position_ids"):
        attention_forward(module, q, q, q, None, cu_seq_lens_q=torch.tensor([0, 4]))
    with pytest.raises(TypeError, match=r"attention_mask: expected dtype torch\.bool"):
        attention_forward(module, q, q, q, torch.ones(1, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="attention_mask: expected a tensor or None"):
        attention_forward(module, q, q, q, fusedseq.Mask())
    with pytest.raises(ValueError, match="attention_mask: expected a mask for 4 queries and 4 keys"):
        attention_forward(module, q, q, q, both(PATTERNS["causal"], (9, 9, 0, 0))[0])
    with pytest.raises(ValueError, match="name: expected one that no other"):
        register("sdpa")
    assert register("another_name") == register("another_name") == "another_name"


def test_without_a_mask():
    """As in transformers' "sdpa": causal if the module or the caller says so and there are several queries."""
    q, k = tensor(2, 4, 5, 8), tensor(2, 2, 5, 8, seed=2)
    module = torch.nn.Module()
    causal = fusedseq.attention(q, k, k, mask=fusedseq.Mask("top-left")).transpose(1, 2)
    full = fusedseq.attention(q, k, k).transpose(1, 2)
    for flag, attribute, want in (
        (None, None, causal),
        (None, False, full),
        (True, False, causal),
        (False, True, full),
    ):
        if attribute is not None:
            module.is_causal = attribute
        assert torch.equal(attention_forward(module, q, k, k, None, is_causal=flag)[0], want)
    one = attention_forward(module, q[:, :, :1], k, k, None, is_causal=True)[0]
    torch.testing.assert_close(one, full[:, :1])
    # Learned queries with batch 1 beside keys of many rows.
    shared = attention_forward(module, q[:1], k, k, None, is_causal=False)[0]
    torch.testing.assert_close(shared, fusedseq.attention(q[:1].expand(2, -1, -1, -1), k, k).transpose(1, 2))
