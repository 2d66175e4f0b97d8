"""Tiny transformers models with random weights, and what a run of one gives: outputs and gradients at real tokens."""

from __future__ import annotations

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

pytest.importorskip("transformers", reason="needs transformers")

import torch
import transformers
from drop_in import Everything64, tensor

from fusedseq.interop import huggingface

huggingface.register()

VOCABULARY, B, L = 61, 3, 21
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
_GROUPED = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_NO_END = {"bos_token_id": 1, "eos_token_id": None}

# name: (class of the model, class of its configuration, arguments of that). Windows are shorter than L.
MODELS = {
    "bert": ("BertModel", "BertConfig", {**_SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**_SIZES, "num_hidden_layers": 3, "num_attention_heads": 4, "local_attention": 8, "pad_token_id": 0,
         "global_attn_every_n_layers": 3},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, **_NO_END, "sliding_window": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, **_NO_END, "sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, **_NO_END}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_GROUPED, **_NO_END, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0},
    ),
}  # fmt: skip
DECODERS = ("mistral", "gemma2", "llama", "gpt_oss")


def made(name, **changes):
    """In evaluation mode."""
    model_class, config_class, arguments = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    model = getattr(transformers, model_class)(config).eval()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")
    return vary(model)


def vary(model):
    """Weights of a size at which attention is far from uniform, and vectors that differ from their initial 0 or 1."""
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in path:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5, generator=gen)
            elif p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=gen) * 0.3)
    return model


def padding(kind, length=L):
    """[B, length] as tokenizers give it: 1 for tokens."""
    if kind == "none":
        return None
    lengths = torch.tensor([[length], [length - 8], [length - 3]])
    right = (torch.arange(length) < lengths).long()
    return right if kind == "right" else right.flip(1)


def tokens(length=L, batch=B, seed=2):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def outcome(model, implementation, mask=None, ids=None, **inputs):
    """Outputs at real tokens, and the gradients of all parameters under a random upstream gradient there."""
    model.set_attn_implementation(implementation)
    ids = tokens() if ids is None else ids
    if model.config.is_encoder_decoder:
        inputs = {"decoder_input_ids": tokens(13, seed=3), **inputs}
        kept = torch.ones(B, 13, dtype=torch.bool)
    else:
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask.bool()
    model.zero_grad()
    result = model(input_ids=ids, attention_mask=mask, **inputs)
    out = (result.logits if hasattr(result, "logits") else result.last_hidden_state)[kept]
    (out * tensor(*out.shape, seed=5, dtype=out.dtype)).sum().backward()
    named = {f"d{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **named}


def truth(model, *args, **kwargs):
    with Everything64():
        return outcome(copy.deepcopy(model).double(), "eager", *args, **kwargs)
