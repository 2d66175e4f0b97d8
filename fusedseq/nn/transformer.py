"""The layers and stacks of the Transformer (Vaswani et al. 2017, arXiv:1706.03762) over our MultiheadAttention.

What torch.nn has besides, a fused layer for evaluation and the packing of padded batches into nested tensors, is left
out: it bypasses what subclasses and hooks change, and gives other numbers than training does.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedseq.nn.attention import record_call
from fusedseq.nn.masks import is_causal as is_causal_mask
from fusedseq.nn.masks import readable
from fusedseq.nn.sublayers import Sublayers, feed_forward
from fusedseq.nn.twins import (
    FUSED,
    Fused,
    TorchTransformer,
    TorchTransformerDecoder,
    TorchTransformerDecoderLayer,
    TorchTransformerEncoder,
    TorchTransformerEncoderLayer,
    fused_class,
)

_canonical_mask: Any = F._canonical_mask


def adopt(module: torch.nn.Module) -> None:
    """Give our classes to the modules that a constructor of torch.nn has just made."""
    for part in module.modules():
        cls = fused_class(type(part))
        if cls is not None:
            part.__class__ = cls


def _canonical(
    src: Tensor, mask: Tensor | None, padding: Tensor | None, names: tuple[str, str]
) -> tuple[Tensor | None, Tensor | None]:
    """Masks as torch.nn hands them on, added to the logits: `_sa_block` of a subclass may count on that."""
    name, padding_name = names
    padding = _canonical_mask(padding, padding_name, F._none_or_dtype(mask), name, src.dtype)
    return _canonical_mask(mask, name, None, "", src.dtype, False), padding


def _detect_causal(mask: Tensor | None, hint: bool | None, x: Tensor, batch_first: bool) -> bool:
    """The hint, or where there is none, whether the mask is the causal one of the length of x."""
    if hint is not None or mask is None:
        return hint is True
    length = x.shape[0 if x.dim() == 2 or not batch_first else 1]
    return mask.shape == (length, length) and readable(mask) and is_causal_mask(mask)


class TransformerEncoderLayer(Fused, TorchTransformerEncoderLayer):
    r"""Self-attention and a feed-forward network, each with a residual connection, dropout and layer normalisation.

    Vaswani et al. 2017 (arXiv:1706.03762, section 3.1); with ``norm_first`` the normalisation comes before each part
    (Xiong et al. 2020, arXiv:2002.04745). Parameters, their names and initialisation, state_dict, errors and results
    are those of `torch.nn.TransformerEncoderLayer`. Training and evaluation compute in one way, so that what a subclass
    or a hook changes holds in both.

    Args:
        d_model: features, E.
        nhead: heads of the attention.
        dim_feedforward: features inside the feed-forward network.
        dropout: of the softmax weights, inside the network and before each residual connection; in training.
        activation: ``"relu"``, ``"gelu"`` or a function of a tensor.
        layer_norm_eps: added to the variance.
        batch_first: tensors are ``[B, S, E]`` in place of ``[S, B, E]``.
        norm_first: normalise the input of each part, not its sum with the residual.
        bias: whether linear layers and normalisations have biases.
        device, dtype: of the parameters.

    Inputs:
        src: ``[S, B, E]``, ``[B, S, E]`` with batch_first, ``[S, E]`` unbatched.
        src_mask, src_key_padding_mask, is_causal: attn_mask, key_padding_mask and is_causal of
            `fusedseq.MultiheadAttention`.

    Outputs: a tensor like src.

    Raises:
        What torch.nn.TransformerEncoderLayer raises in training.
    """

    if not TYPE_CHECKING:

        @functools.wraps(TorchTransformerEncoderLayer.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the encoded sequence."""
        traced: Any = record_call(
            self, src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
        )
        if traced is not None:
            return traced
        if not isinstance(src, Tensor) or src.is_nested:
            # A stack of torch.nn made it, in evaluation; ragged batches are torch's.
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        names = ("src_mask", "src_key_padding_mask")
        src_mask, src_key_padding_mask = _canonical(src, src_mask, src_key_padding_mask, names)
        stream = Sublayers(self, TorchTransformerEncoderLayer, src)
        a = self.norm1(src) if self.norm_first else src

        def attend() -> Tensor:
            return self.self_attn(
                a, a, a, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False,
                is_causal=is_causal,
            )[0]  # fmt: skip

        def block() -> Tensor:
            return self._sa_block(a, src_mask, src_key_padding_mask, is_causal=is_causal)

        if self.norm_first:
            f = stream.pre("_sa_block", self.dropout1, self.norm2, attend, block)
            stream.last("_ff_block", self.dropout2, lambda: feed_forward(self, f), lambda: self._ff_block(f))
        else:
            stream.post("_sa_block", self.dropout1, self.norm1, attend, block)
            f = stream.x
            stream.post(
                "_ff_block", self.dropout2, self.norm2, lambda: feed_forward(self, f), lambda: self._ff_block(f)
            )
        return stream.x


class TransformerDecoderLayer(Fused, TorchTransformerDecoderLayer):
    r"""Self-attention, attention to a memory and a feed-forward network, each as in `fusedseq.TransformerEncoderLayer`.

    Parameters, their names and initialisation, state_dict, errors and results are those of
    `torch.nn.TransformerDecoderLayer`, whose forward this is; the attention is ours.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
        dtype: as in `fusedseq.TransformerEncoderLayer`.

    Inputs:
        tgt: ``[T, B, E]``, ``[B, T, E]`` with batch_first, ``[T, E]`` unbatched.
        memory: the same with S in place of T.
        tgt_mask, tgt_key_padding_mask, tgt_is_causal: masks of the self-attention, see `fusedseq.MultiheadAttention`.
        memory_mask, memory_key_padding_mask, memory_is_causal: masks of the attention to the memory.

    Outputs: a tensor like tgt.

    Raises:
        What torch.nn.TransformerDecoderLayer raises.
    """

    if not TYPE_CHECKING:

        @functools.wraps(TorchTransformerDecoderLayer.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Return the decoded sequence."""
        kwargs: dict[str, Any] = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": tgt_is_causal,
            "memory_is_causal": memory_is_causal,
        }
        traced: Any = record_call(self, tgt, memory, **kwargs)
        if traced is not None:
            return traced
        if not isinstance(tgt, Tensor) or tgt.is_nested:
            return super().forward(tgt, memory, **kwargs)
        stream = Sublayers(self, TorchTransformerDecoderLayer, tgt)
        if stream.watched:
            return super().forward(tgt, memory, **kwargs)
        a = self.norm1(tgt) if self.norm_first else tgt

        def attend() -> Tensor:
            return self.self_attn(
                a, a, a, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal,
                need_weights=False,
            )[0]  # fmt: skip

        def block() -> Tensor:
            return self._sa_block(a, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def attend_memory() -> Tensor:
            return self.multihead_attn(
                c, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask,
                is_causal=memory_is_causal, need_weights=False,
            )[0]  # fmt: skip

        def memory_block() -> Tensor:
            return self._mha_block(c, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        if self.norm_first:
            c = stream.pre("_sa_block", self.dropout1, self.norm2, attend, block)
            f = stream.pre("_mha_block", self.dropout2, self.norm3, attend_memory, memory_block)
            stream.last("_ff_block", self.dropout3, lambda: feed_forward(self, f), lambda: self._ff_block(f))
        else:
            stream.post("_sa_block", self.dropout1, self.norm1, attend, block)
            c = stream.x
            stream.post("_mha_block", self.dropout2, self.norm2, attend_memory, memory_block)
            f = stream.x
            stream.post(
                "_ff_block", self.dropout3, self.norm3, lambda: feed_forward(self, f), lambda: self._ff_block(f)
            )
        return stream.x


class TransformerEncoder(Fused, TorchTransformerEncoder):
    r"""A stack of encoder layers; see `torch.nn.TransformerEncoder`.

    Padding stays where it is: `enable_nested_tensor` and `mask_check` are accepted and kept, but no batch is packed
    into a nested tensor. What comes out at padded places is then what training gives, where torch.nn in evaluation
    gives zeros, or the bias of `norm`.

    Args:
        encoder_layer: copied num_layers times; of ours, of torch.nn, or any module that is called alike and has a
            ``self_attn`` with ``batch_first``.
        num_layers: how often.
        norm: applied to the output of the last layer, if given.
        enable_nested_tensor, mask_check: of `torch.nn.TransformerEncoder`, without effect here.

    Inputs:
        src: as for the layers.
        mask, src_key_padding_mask: handed to each layer.
        is_causal: whether mask is the causal one; found out if not given.

    Outputs: a tensor like src.

    Raises:
        What torch.nn.TransformerEncoder raises in training.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return the output of the last layer."""
        traced: Any = record_call(self, src, mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        if traced is not None:
            return traced
        if not isinstance(src, Tensor) or src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        mask, src_key_padding_mask = _canonical(src, mask, src_key_padding_mask, ("mask", "src_key_padding_mask"))
        first: Any = self.layers[0]
        causal = _detect_causal(mask, is_causal, src, first.self_attn.batch_first)
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(Fused, TorchTransformerDecoder):
    r"""A stack of decoder layers; see `torch.nn.TransformerDecoder`.

    Args:
        decoder_layer: copied num_layers times; of ours, of torch.nn, or any module that is called alike and has a
            ``self_attn`` with ``batch_first``.
        num_layers: how often.
        norm: applied to the output of the last layer, if given.

    Inputs: those of the layers. Whether tgt_mask is the causal one is found out if tgt_is_causal is not given.

    Outputs: a tensor like tgt.

    Raises:
        What torch.nn.TransformerDecoder raises.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Return the output of the last layer."""
        kwargs: dict[str, Any] = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": tgt_is_causal,
            "memory_is_causal": memory_is_causal,
        }
        traced: Any = record_call(self, tgt, memory, **kwargs)
        if traced is not None:
            return traced
        if isinstance(tgt, Tensor) and (
            tgt_mask is None or tgt_mask.is_floating_point() or tgt_mask.dtype is torch.bool
        ):
            first: Any = self.layers[0]
            # Torch looks at the mask even while a graph is captured, which breaks it.
            kwargs["tgt_is_causal"] = _detect_causal(tgt_mask, tgt_is_causal, tgt, first.self_attn.batch_first)
        return super().forward(tgt, memory, **kwargs)


class Transformer(Fused, TorchTransformer):
    r"""An encoder and a decoder (Vaswani et al. 2017, arXiv:1706.03762); see `torch.nn.Transformer`.

    Parameters, their names and initialisation, state_dict, errors and results are those of the module of torch.nn,
    whose forward this is; encoder and decoder are ours, unless the caller brings them.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
        dtype: as in `fusedseq.TransformerEncoderLayer`.
        num_encoder_layers, num_decoder_layers: how many layers.
        custom_encoder, custom_decoder: used as they are in place of `fusedseq.TransformerEncoder` and
            `fusedseq.TransformerDecoder`.

    Inputs:
        src: ``[S, B, E]``, ``[B, S, E]`` with batch_first, ``[S, E]`` unbatched, for the encoder.
        tgt: the same with T in place of S, for the decoder.
        src_mask, src_key_padding_mask, src_is_causal: masks of the encoder.
        tgt_mask, tgt_key_padding_mask, tgt_is_causal: masks of the decoder's self-attention.
        memory_mask, memory_key_padding_mask, memory_is_causal: masks of its attention to what the encoder gives.

    Outputs: a tensor like tgt.

    Raises:
        What torch.nn.Transformer raises: RuntimeError for sizes that do not fit.
    """

    if not TYPE_CHECKING:

        @functools.wraps(TorchTransformer.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            given = inspect.signature(TorchTransformer.__init__).bind(self, *args, **kwargs).arguments
            for name in ("encoder", "decoder"):
                if given.get(f"custom_{name}") is None:
                    adopt(getattr(self, name))

        @functools.wraps(TorchTransformer.forward)
        def forward(self, src, tgt, *args, **kwargs):
            traced = record_call(self, src, tgt, *args, **kwargs)
            return super().forward(src, tgt, *args, **kwargs) if traced is None else traced


FUSED.update(
    {
        TorchTransformerEncoderLayer: TransformerEncoderLayer,
        TorchTransformerDecoderLayer: TransformerDecoderLayer,
        TorchTransformerEncoder: TransformerEncoder,
        TorchTransformerDecoder: TransformerDecoder,
        TorchTransformer: Transformer,
    }
)
