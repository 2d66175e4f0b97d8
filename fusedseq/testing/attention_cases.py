"""Attention cases as text, and the tensors that go with them.

As for the scan, a case is its sizes and a few words, `B2H4K2L65S130E64-causal-left16-bias`; K is the number of key
heads (H if left out), V the size of a value (E if left out). The words:
    causal, br      causal, aligned top-left; bottom-right
    left<n>         window to the left; likewise right<n>
    lengths         a key length for each batch row, the first 0
    packed          three packed sequences, with rows behind the last (B = 1)
    global          some keys are seen from everywhere, a table for each batch row
    dense           a boolean table [B, H, L, S]; denseL1 the same for all queries and heads; one row is wholly masked
    bias            a table of the inputs' dtype [B, H, L, S]; biasH [1, H, L, S]; biasS [B, 1, 1, S];
                    biasL [1, 1, L, 1]; bias32 float32 [1, H, L, S]; biasinf [1, 1, L, S] with -inf above the diagonal
    alibi, sinks, softcap, dropout
    lse             lse receives an upstream gradient too
    blhe            tensors are transposed views of [B, L, H, E]
    sliced          strided slices of larger buffers, with NaN between their elements
    expanded        k and v are expanded over the batch
    x<n>            q is n times larger
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedseq.reference.attention import BOTTOM_RIGHT, TOP_LEFT, Problem

from .cases import short

# Small enough for every dtype, ISA and emulator; between them they use every word.
COMPACT = """
B1H1L1S1E1-lse
B2H4K2L33S65E16-causal-lse-blhe
B1H2L70S70E64-left9-right5-bias-lse
B2H3L17S130E33V48-lengths-alibi-sliced-lse
B1H4K1L50S61E8-packed-causal-sinks-lse
B2H2L65S65E32-left7-right0-global-lse
B2H2L19S40E80-dense-softcap-dropout-lse
B2H6K2L1S200E64-br-lse
B3H2L49S7E24V5-biasH-dropout-expanded
B2H2L0S5E8-lse
B2H2L5S0E8-lse
B0H2L5S5E8
"""

# Together with the compact ones every two words that can meet do so at least once.
FULL = """
B2H2L128S128E64-causal
B1H1L200S200E128-br-left50-lse
B2H4K4L97S64E40V72-biasS-lengths-blhe
B1H8K2L12S300E64-br-alibi-lse
B1H2L130S130E256-causal-dropout
B1H3L129S257E31V17-left20-right30-biasL-sinks-sliced
B2H2L64S64E64-bias32-softcap-causal-lse
B2H2L66S66E16-biasinf-dropout-lse
B3H4K2L9S90E48-denseL1-alibi-sinks-lse-blhe
B2H2L77S77E8-left0-global-lengths-bias
B2H2L63S63E96-left4-right4-global-dropout-alibi-lse
B1H2L100S100E64-packed-dropout-bias-lse
B1H4K2L100S100E32-packed-left5-right2-softcap-blhe
B1H2L90S95E16-packed-br-alibi-dense-lse
B1H2L64S80E16-packed-left3-global-biasH-sinks
B2H4K1L3S70E64V128-dropout-sinks-lse
B2H4K1L2S600E16-lengths-br-softcap-alibi-bias-lse
B2H2L40S40E64-x50
B2H2L40S40E64-x100-causal
B4H2L37S41E65-dense-bias-lengths-expanded-lse
B2H2L100S100E4-dropout-lengths-sinks-softcap
B1H1L300S300E16-left64-right0-br-dropout-blhe
B2H3L33S50E20V40-biasS-dense-global-left3-softcap-sinks
B1H2L21S50E16-br-biasL-lengths-dropout-sliced
B2H2L50S50E72-denseL1-dropout-alibi-causal-left20
B1H2L33S64E12-biasH-sinks-alibi-softcap-right3-lse
B2H2L30S30E16-expanded-sinks-lse-left5-biasinf
B1H4K2L4S1030E64-lse-biasS
B1H2L1030S1030E16-left30-right10-lse
B2H2L3S5E0V4-lse
"""

_SIZES = re.compile(r"B(\d+)H(\d+)(?:K(\d+))?L(\d+)S(\d+)E(\d+)(?:V(\d+))?")
_WORD = re.compile(r"(left|right|x)(\d+)")
_FLAGS = (
    "causal", "br", "lengths", "packed", "global", "dense", "denseL1", "bias", "biasH", "biasS", "biasL", "bias32",
    "biasinf", "alibi", "sinks", "softcap", "dropout", "lse", "blhe", "sliced", "expanded",
)  # fmt: skip


@dataclass(frozen=True)
class AttentionCase:
    """One call of attention, but for its dtype and device."""

    text: str

    def __post_init__(self) -> None:
        if _SIZES.fullmatch(self.text.split("-")[0]) is None:
            raise ValueError(f"unknown sizes in the case {self.text!r}")
        for word in self.words:
            if word not in _FLAGS and _WORD.fullmatch(word) is None:
                raise ValueError(f"unknown word {word!r} in the case {self.text!r}")

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, Hq, Hkv, L, S, E, Ev."""
        found = _SIZES.fullmatch(self.text.split("-")[0])
        assert found is not None
        B, H, K, L, S, E, V = found.groups()
        return int(B), int(H), int(K or H), int(L), int(S), int(E), int(V or E)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.text.split("-")[1:])

    def number(self, word: str, default: int) -> int:
        """The number of `left<n>` and its kin."""
        for one in self.words:
            found = _WORD.fullmatch(one)
            if found is not None and found[1] == word:
                return int(found[2])
        return default

    def id(self, dtype: torch.dtype) -> str:
        return f"attention-{short(dtype)}-{self.text}"


@dataclass
class AttentionInputs:
    case: AttentionCase
    problem: Problem
    dout: Tensor
    dlse: Tensor | None

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same numbers in another dtype; exact if it is a wider one."""

        def cast(t: Any) -> Any:
            return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

        dlse = None if self.dlse is None else self.dlse.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return AttentionInputs(self.case, Problem(*map(cast, self.problem)), self.dout.to(dtype), dlse)


def attention_cases(dtype: torch.dtype) -> list[AttentionCase]:
    """float32 and bfloat16 run every case, the others the compact ones."""
    full = dtype in (torch.float32, torch.bfloat16)
    return [AttentionCase(text) for text in (COMPACT + (FULL if full else "")).split()]


def _view(t: Tensor, words: tuple[str, ...]) -> Tensor:
    if "blhe" in words:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if "sliced" in words:
        buffer = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
        buffer[..., 1 : 1 + t.shape[-1]] = t
        return buffer[..., 1 : 1 + t.shape[-1]]
    return t


def make_attention(
    case: AttentionCase, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> AttentionInputs:
    """The tensors of a case: the same for every dtype up to rounding, and different for any two cases."""
    gen = torch.Generator().manual_seed(zlib.crc32(f"{case.text}-{seed}".encode()))
    B, Hq, Hkv, L, S, E, Ev = case.sizes
    words = case.words

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=gen, dtype=torch.float64)).to(device, dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=gen, dtype=torch.float64)

    def ends(total: int) -> Tensor:
        cuts = (uniform(3).sort().values * (total + 1)).long().clamp(max=total)
        return torch.cat([torch.zeros(1, dtype=torch.int64), cuts]).to(device)

    q = _view(normal(B, Hq, L, E, scale=case.number("x", 1)), words)
    rows = 1 if "expanded" in words else B
    k, v = (_view(normal(rows, Hkv, S, width), words).expand(B, -1, -1, -1) for width in (E, Ev))
    bias = None
    for word, shape in (
        ("bias", (B, Hq, L, S)), ("biasH", (1, Hq, L, S)), ("bias32", (1, Hq, L, S)), ("biasS", (B, 1, 1, S)),
        ("biasL", (1, 1, L, 1)), ("biasinf", (1, 1, L, S)),
    ):  # fmt: skip
        if word in words:
            bias = normal(*shape).float() if word == "bias32" and dtype != torch.float64 else normal(*shape)
            if word == "biasinf":
                bias = bias.masked_fill(torch.ones(L, S, dtype=torch.bool, device=device).triu(1), float("-inf"))
    dense = None
    if "dense" in words or "denseL1" in words:
        dense = (uniform(*((B, Hq, L, S) if "dense" in words else (B, 1, 1, S))) > 0.4).to(device)
        dense[..., : 1 if "dense" in words else 0, :] = False
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lengths = (uniform(B) * (S + 1)).long().clamp(max=S) if "lengths" in words else None
    if lengths is not None and B:
        lengths[0] = 0
    causal = TOP_LEFT if "causal" in words else BOTTOM_RIGHT if "br" in words else 0
    packed = "packed" in words
    problem = Problem(
        q, k, v, bias,
        alibi_slopes=uniform(Hq).to(device, dtype) if "alibi" in words else None,
        sinks=normal(Hq) if "sinks" in words else None,
        dense=dense,
        key_lengths=None if lengths is None else lengths.to(device),
        cu_q=ends(L) if packed else None, cu_k=ends(S) if packed else None,
        global_keys=(uniform(B, S) > 0.8).to(device) if "global" in words else None,
        seed=torch.tensor(0x1234567890ABCDEF, device=device) if "dropout" in words else None,
        causal=causal, left=case.number("left", -1), right=0 if causal else case.number("right", -1),
        scale=E**-0.5 if E else 1.0,
        softcap=2.5 if "softcap" in words else 0.0,
        dropout_p=0.3 if "dropout" in words else 0.0,
    )  # fmt: skip
    dout = _view(normal(B, Hq, L, Ev), words)
    dlse = normal(B, Hq, L).to(wide) if "lse" in words else None
    return AttentionInputs(case, problem, dout, dlse)
