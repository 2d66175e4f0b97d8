"""The networks that the forecaster chooses from, each made of torch.nn's modules or of fusedseq's.

Every backbone maps [B, window, features] to [B, window, hidden]; the parameters of both kinds are the same under one
seed. Sizes: B batch, L window, C channels (hidden), H heads.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4
KERNEL = 3  # hours that one causal convolution sees
SPAN = 24  # width of Longformer's window: twelve hours to either side


class TableLongformerSelfAttention(nn.Module):
    """What fusedseq.LongformerSelfAttention computes, the window as a table of L x L: torch.nn has no such module."""

    def __init__(self, channels: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.side, self.dropout = heads, window // 2, dropout
        for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
            self.add_module(name, nn.Linear(channels, channels))

    def forward(self, x: Tensor, global_mask: Tensor) -> Tensor:  # [B, L, C], bool [B, L] -> [B, L, C]
        at = torch.arange(x.shape[1])
        near = (at[:, None] - at).abs() <= self.side
        local = self._attend(x, self.query, self.key, self.value, (near | global_mask[:, None])[:, None])
        everywhere = self._attend(x, self.query_global, self.key_global, self.value_global, None)
        return torch.where(global_mask[:, :, None], everywhere, local)

    def _attend(self, x: Tensor, query: nn.Module, key: nn.Module, value: nn.Module, mask: Tensor | None) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


def library(module: str) -> Any:
    """The same names from fusedseq and from torch."""
    if module == "fusedseq":
        import fusedseq

        return fusedseq
    return SimpleNamespace(
        RNN=nn.RNN,
        LSTM=nn.LSTM,
        GRU=nn.GRU,
        TransformerEncoder=nn.TransformerEncoder,
        TransformerEncoderLayer=nn.TransformerEncoderLayer,
        LongformerSelfAttention=TableLongformerSelfAttention,
        scaled_dot_product_attention=F.scaled_dot_product_attention,
    )


class Recurrent(nn.Module):
    """RNN, LSTM or GRU."""

    def __init__(self, layer: type[nn.RNNBase], features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0  # these modules have dropout between layers only
        self.layers = layer(features, hidden, num_layers=layers, dropout=between, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[0]


class Embedding(nn.Module):
    """A linear map, plus sines and cosines of the place (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, hidden)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, features] -> [B, L, C]
        channels = self.linear.out_features
        rate = torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000) / channels))
        angle = torch.arange(x.shape[1])[:, None] * rate
        return self.linear(x) + torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(x)


class Transformer(nn.Module):
    """An encoder with the normalisation first: every hour sees the whole window."""

    def __init__(self, source: Any, features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = Embedding(features, hidden)
        layer = source.TransformerEncoderLayer(
            hidden, HEADS, 2 * hidden, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(hidden)
        self.encoder = source.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embedding(x))


class Block(nn.Module):
    """An encoder layer, normalisation first, around an attention of one's own: [B, L, C] -> [B, L, C]."""

    def __init__(self, attention: nn.Module, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.project = attention, nn.Linear(hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.network = nn.Sequential(
            nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * hidden, hidden)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        x = x + self.drop(self.project(self.attention(self.norm1(x), **masks)))
        return x + self.drop(self.network(self.norm2(x)))


class Longformer(nn.Module):
    """Hours see those nearby and the last one, which is global (Beltagy et al. 2020, arXiv:2004.05150)."""

    def __init__(self, source: Any, features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = Embedding(features, hidden)
        attention = source.LongformerSelfAttention
        self.blocks = nn.ModuleList(
            Block(attention(hidden, HEADS, SPAN, dropout), hidden, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        last = torch.zeros(x.shape[:2], dtype=torch.bool)
        last[:, -1] = True
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, global_mask=last)
        return self.norm(x)


class CausalConv(nn.Module):
    """A convolution along time that sees an hour and those before it: [B, L, C_in] -> [B, L, C_out]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(channels, out, KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(F.pad(x.transpose(1, 2), (KERNEL - 1, 0))).transpose(1, 2)


class ConvAttention(nn.Module):
    """Causal attention whose queries and keys are convolutions, so that shapes are compared and not single hours.

    Li et al. 2019 (arXiv:1907.00235, section 4.1).
    """

    def __init__(self, attend: Any, channels: int, dropout: float) -> None:
        super().__init__()
        self.attend, self.dropout = attend, dropout
        self.query_key, self.value = CausalConv(channels, 2 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, C] -> [B, L, C]
        parts = (*self.query_key(x).chunk(2, -1), self.value(x))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)  # each [B, H, L, C/H]
        dropout = self.dropout if self.training else 0.0
        return self.attend(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2).flatten(2)


class Hybrid(nn.Module):
    """A causal convolution for what is local, an LSTM for order, attention for what lies far back."""

    def __init__(self, source: Any, features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.convolution = CausalConv(features, hidden)
        self.lstm = source.LSTM(hidden, hidden, batch_first=True)
        attend = source.scaled_dot_product_attention
        self.blocks = nn.Sequential(
            *(Block(ConvAttention(attend, hidden, dropout), hidden, dropout) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return self.norm(self.blocks(x + self.lstm(x)[0]))


RECURRENT = ("rnn", "lstm", "gru")
ATTENTIVE = {"transformer": Transformer, "longformer": Longformer, "hybrid": Hybrid}
MODELS = (*RECURRENT, *ATTENTIVE)


def backbone(model: str, module: str, features: int, hidden: int, layers: int, dropout: float) -> nn.Module:
    """The network called `model`, made of fusedseq's modules if `module` is "fusedseq", else of torch's."""
    source = library(module)
    if model in RECURRENT:
        return Recurrent(getattr(source, model.upper()), features, hidden, layers, dropout)
    if hidden % HEADS:
        raise ValueError(f"hidden must be a multiple of the {HEADS} heads, got {hidden}")
    return ATTENTIVE[model](source, features, hidden, layers, dropout)
