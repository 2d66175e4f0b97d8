"""Numbers below a million in English and German words: a parallel corpus that is made, not downloaded.

The languages disagree on order (twenty-one is ein-und-zwanzig) and on what is said (one hundred and, hundert), so a
translator has to learn grammar, not a dictionary. German writes a number as one word; here its parts are the tokens.
"""

import random

import torch
from torch import Tensor


def _words(text: str) -> list[str]:
    return text.split()


_ENGLISH = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_ENGLISH_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_GERMAN = _words(
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
)
_GERMAN_TENS = _words("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")

PAD, START, END = 0, 1, 2


def english(n: int) -> list[str]:
    """21406 as twenty one thousand four hundred and six."""
    if n < 20:
        return [_ENGLISH[n]]
    if n < 100:
        return [_ENGLISH_TENS[n // 10 - 2], *(english(n % 10) if n % 10 else [])]
    if n < 1000:
        return [*english(n // 100), "hundred", *(["and", *english(n % 100)] if n % 100 else [])]
    rest = n % 1000
    return [*english(n // 1000), "thousand", *(["and"] if 0 < rest < 100 else []), *(english(rest) if rest else [])]


def german(n: int, last: bool = True) -> list[str]:
    """21406 as ein und zwanzig tausend vier hundert sechs; a one that ends the number is eins."""
    if n == 1 and last:
        return ["eins"]
    if n < 20:
        return [_GERMAN[n]]
    if n < 100:
        return [*([_GERMAN[n % 10], "und"] if n % 10 else []), _GERMAN_TENS[n // 10 - 2]]
    size, word = (100, "hundert") if n < 1000 else (1000, "tausend")
    return [*german(n // size, last=False), word, *(german(n % size, last) if n % size else [])]


class Vocabulary:
    def __init__(self, words: list[str]) -> None:
        self.words = ["<pad>", "<start>", "<end>", *sorted(set(words))]
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentences: list[list[str]]) -> Tensor:  # [N, longest + 2]
        rows = [[START, *(self.index[word] for word in sentence), END] for sentence in sentences]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])

    def decode(self, row: Tensor) -> list[str]:
        """Up to the end, without the marks."""
        words: list[str] = []
        for i in row.tolist():
            if i == END:
                break
            if i not in (PAD, START):
                words.append(self.words[i])
        return words


SOURCE = Vocabulary([*_ENGLISH, *_ENGLISH_TENS, "hundred", "thousand", "and"])
TARGET = Vocabulary([*_GERMAN, *_GERMAN_TENS, "eins", "und", "hundert", "tausend"])


def corpus(pairs: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers to learn from and others to be judged by, all different; of every length alike."""
    draw = random.Random(seed)
    numbers: dict[int, None] = {}
    while len(numbers) < pairs + held_out:
        low = 10 ** draw.randrange(6)
        numbers[draw.randrange(low if low > 1 else 0, 10 * low)] = None
        if len(numbers) >= 1_000_000:
            raise ValueError(f"there are a million numbers, got {pairs} + {held_out}")
    every = list(numbers)
    draw.shuffle(every)
    return every[:pairs], every[pairs : pairs + held_out]
