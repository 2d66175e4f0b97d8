"""Models of transformers with each attention: `python -m fusedseq.bench.huggingface [--rows bert] [--budget 4]`.

Random weights. Outputs are compared with "eager" before anything is timed; implementations then run in turns. The row
longformer shows transformers' own layer and the fused one over the length: time per token stays, since cost is linear.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from fusedseq.interop import huggingface

from .timing import interleave

IMPLEMENTATIONS = ("fusedseq", "sdpa", "eager")
LENGTHS = (1024, 2048, 4096, 8192, 16384)
_TEXT: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "max_position_embeddings": 8192, "pad_token_id": 0,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Call = Callable[[], Any]


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, 1000, (batch, length), generator=torch.Generator().manual_seed(0))


def _bert(length: int, train: bool) -> tuple[Any, Call]:
    """Rows of lengths from half to all, padded on the right."""
    model = transformers.BertModel(transformers.BertConfig(**_TEXT, **_NO_DROPOUT))
    ids = _tokens(8, length)
    mask = (torch.arange(length) < torch.linspace(length // 2, length, 8).long()[:, None]).long()
    kept = mask.bool()
    upstream = torch.randn(int(kept.sum()), 512, generator=torch.Generator().manual_seed(1))

    def call() -> Tensor:
        if not train:
            with torch.no_grad():
                return model(ids, attention_mask=mask).last_hidden_state[kept]
        model.zero_grad()
        out = model(ids, attention_mask=mask).last_hidden_state[kept]
        out.backward(upstream)
        return out.detach()

    return model.train(train), call


def _prompt(kind: str, length: int, **options: Any) -> tuple[Any, Call]:
    config = getattr(transformers, f"{kind}Config")(**_DECODER, **options)
    model, ids = getattr(transformers, f"{kind}ForCausalLM")(config).eval(), _tokens(1, length)

    @torch.no_grad()
    def call() -> Tensor:
        return model(ids, logits_to_keep=1).logits

    return model, call


def _generate(batch: int, length: int, new: int) -> tuple[Any, Call]:
    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER)).eval(), _tokens(batch, length)
    return model, lambda: model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))


ROWS: dict[str, Callable[[], tuple[Any, Call]]] = {
    "bert forward B8 L128": lambda: _bert(128, False),
    "bert forward B8 L512": lambda: _bert(512, False),
    "bert forward + backward B8 L128": lambda: _bert(128, True),
    "bert forward + backward B8 L512": lambda: _bert(512, True),
    "llama prompt B1 L1024": lambda: _prompt("Llama", 1024),
    "mistral window 256 prompt B1 L4096": lambda: _prompt("Mistral", 4096, sliding_window=256),
    "llama generate B1 64 after 256": lambda: _generate(1, 256, 64),
    "llama generate B4 32 after 1024": lambda: _generate(4, 1024, 32),
}


def _switched(model: Any, call: Call, implementation: str) -> Call:
    def run() -> Any:
        model.set_attn_implementation(implementation)
        return call()

    return run


def measure(row: str, budget: float) -> str:
    torch.manual_seed(0)
    model, call = ROWS[row]()
    runners = {name: _switched(model, call, name) for name in IMPLEMENTATIONS}
    torch.testing.assert_close(runners["fusedseq"](), runners["eager"](), rtol=1e-3, atol=1e-3)
    seconds = {name: timing.median for name, timing in interleave(runners, budget).items()}
    mine = seconds["fusedseq"]
    return f"{row:38}" + "".join(f"  {name} {1e3 * s:8.1f} ms ({s / mine:4.2f})" for name, s in seconds.items())


def longformer(budget: float) -> Iterator[str]:
    """A window of 512, one global token, forward."""
    config = transformers.LongformerConfig(**{**_TEXT, "num_hidden_layers": 1}, **_NO_DROPOUT, attention_window=[512])
    torch.manual_seed(0)
    layers = [transformers.LongformerModel(config).encoder.layer[0].attention.self.eval() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    huggingface.fuse_longformer(layers[1])
    for length in LENGTHS:
        x = torch.randn(1, length, 512, generator=torch.Generator().manual_seed(1))
        marked = torch.zeros(1, length, dtype=torch.bool)
        marked[0, 0] = True
        masks = (marked * 1e4, torch.zeros_like(marked), marked, True)

        def run(layer: Any, x: Tensor = x, masks: tuple[Any, ...] = masks) -> Tensor:
            with torch.no_grad():
                return layer(x, *masks)[0]

        torch.testing.assert_close(run(layers[1]), run(layers[0]), rtol=1e-3, atol=1e-4)
        runners: dict[str, Call] = {"transformers": lambda: run(layers[0]), "fusedseq": lambda: run(layers[1])}
        seconds = {name: timing.median for name, timing in interleave(runners, budget).items()}
        yield f"longformer layer L{length:<6}" + "".join(
            f"  {name} {1e3 * s:8.2f} ms, {1e6 * s / length:5.2f} us per token" for name, s in seconds.items()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[], help="parts of the names of rows")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each row")
    options = parser.parse_args()
    huggingface.register()
    print(f"{torch.get_num_threads()} threads; in brackets the time over that of fusedseq", flush=True)
    for row in ROWS:
        if not options.rows or any(part in row for part in options.rows):
            print(measure(row, options.budget), flush=True)
    if not options.rows or any(part in "longformer" for part in options.rows):
        for line in longformer(options.budget / len(LENGTHS)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
