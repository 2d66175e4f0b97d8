"""Translates numerals from English to German with a Transformer: torch's and fusedseq's, side by side.

    python examples/translation.py                        # both modules
    python examples/translation.py --module fusedseq      # one of them
    python examples/translation.py --dropout 0.1          # the networks then differ: each draws its own

Both networks start from the same weights and see the same batches, so that without dropout their losses must agree.
The last table is what the network makes of numbers that it has never seen.
"""

import argparse
import statistics
import sys
import time
import warnings

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fusedseq
from numerals import END, PAD, SOURCE, START, TARGET, corpus, english, german

MODULES = {"torch": nn.Transformer, "fusedseq": fusedseq.Transformer}


class Translator(nn.Module):
    """Embeddings with learned positions, an encoder and a decoder, logits over the words of the target."""

    def __init__(self, transformer: type[nn.Transformer], hidden: int, layers: int, dropout: float, longest: int):
        super().__init__()
        self.source = nn.Embedding(len(SOURCE), hidden, padding_idx=PAD)
        self.target = nn.Embedding(len(TARGET), hidden, padding_idx=PAD)
        self.position = nn.Parameter(torch.randn(longest, hidden) * 0.02)
        self.transformer = transformer(
            hidden, 4, layers, layers, 4 * hidden, dropout, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(hidden, len(TARGET))

    def encode(self, source: Tensor) -> Tensor:  # [B, S] -> [B, S, hidden]
        x = self.source(source) + self.position[: source.shape[1]]
        return self.transformer.encoder(x, src_key_padding_mask=source == PAD)

    def decode(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:  # [B, T] -> [B, T, words]
        T = target.shape[1]
        x = self.target(target) + self.position[:T]
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        # Padding of the target lies behind every word that is asked for, so the causal mask hides it.
        x = self.transformer.decoder(
            x, memory, tgt_mask=mask, memory_key_padding_mask=source == PAD, tgt_is_causal=True
        )
        return self.head(x)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, self.encode(source), source)

    @torch.no_grad()
    def translate(self, source: Tensor, longest: int) -> Tensor:  # [B, S] -> [B, longest]
        """The likeliest word, one after the other."""
        memory = self.encode(source)
        out = torch.full((len(source), 1), START)
        for _ in range(longest - 1):
            out = torch.cat([out, self.decode(out, memory, source)[:, -1:].argmax(-1)], 1)
            if bool((out == END).any(1).all()):
                break
        return out


def train(
    options: argparse.Namespace, module: str, source: Tensor, target: Tensor
) -> tuple[Translator, list[float], float]:
    """The network, its losses, and pairs per second."""
    torch.manual_seed(options.seed)
    longest = max(source.shape[1], target.shape[1])
    network = Translator(MODULES[module], options.hidden, options.layers, options.dropout, longest)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps)
    order = torch.Generator().manual_seed(options.seed)
    losses, seconds = [], []
    for _ in tqdm(range(options.steps), desc=f"{module:8}", unit="step", mininterval=0.2):
        rows = torch.randint(len(source), (options.batch,), generator=order)
        x, y = source[rows], target[rows]
        start = time.perf_counter()
        logits = network(x, y[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return network.eval(), losses, options.batch / statistics.median(seconds)


def judge(
    network: Translator, source: Tensor, numbers: list[int], longest: int
) -> tuple[float, float, list[list[str]]]:
    """The part of numbers that came out right to the last word, numbers per second, and what came out."""
    start = time.perf_counter()
    made = [TARGET.decode(row) for part in source.split(500) for row in network.translate(part, longest)]
    seconds = time.perf_counter() - start
    right = sum(words == german(n) for words, n in zip(made, numbers, strict=True))
    return right / len(numbers), len(numbers) / seconds, made


def agree(a: list[float], b: list[float], early: int = 50) -> bool:
    """Same weights, same batches: losses must be the same up to rounding, which training slowly amplifies."""
    gap = max(abs(x - y) / x for x, y in zip(a[:early], b[:early], strict=True))
    same = gap < 1e-3
    print(f"\nTraining loss of both, first {min(early, len(a))} steps: largest relative difference {gap:.1e}, "
          f"{'agree' if same else 'DIFFER'}")  # fmt: skip
    return same


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--hidden", type=int, default=64, help="a multiple of the 4 heads (default: 64)")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder and of the decoder (default: 2)")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=4e-3, help="largest learning rate (default: 0.004)")
    parser.add_argument("--pairs", type=int, default=20_000, help="to learn from (default: 20,000)")
    parser.add_argument("--test", type=int, default=1000, help="numbers to be judged by (default: 1,000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    options = parse()
    warnings.filterwarnings("ignore", message="enable_nested_tensor")  # norm_first: torch tells that it packs nothing
    learned, unseen = corpus(options.pairs, options.test, options.seed)
    source, target = (v.encode([f(n) for n in learned + unseen]) for v, f in ((SOURCE, english), (TARGET, german)))
    training, test = (source[: len(learned)], target[: len(learned)]), source[len(learned) :]
    losses, rows, made = {}, [], []
    for module in options.module:
        network, losses[module], rate = train(options, module, *training)
        right, speed, made = judge(network, test, unseen, target.shape[1])
        rows.append(f"{module:<9} {losses[module][-1]:>9.4f} {right:>9.1%} {rate:>16,.0f} {speed:>20,.0f}")
    print(f"\n{'module':<9} {'last loss':>9} {'all right':>9} {'pairs/s training':>16} {'numbers/s translated':>20}")
    print("\n".join(rows))
    print(f"all right: of {len(unseen):,} numbers never seen, how many came out without an error in any word.")
    same = options.dropout > 0 or len(losses) < 2 or agree(*losses.values())
    print(f"\n{options.module[-1]}'s translations:")
    for n, words in list(zip(unseen, made, strict=True))[:5]:
        print(f"{n:>9,}  {' '.join(english(n))}  ->  {''.join(words)}{'' if words == german(n) else '   WRONG'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
