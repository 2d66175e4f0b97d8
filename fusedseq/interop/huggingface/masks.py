"""The masks of transformers' models as structure: what `register` registers as mask function.

transformers describes a mask by a function of (batch, head, query, key) made of a few closures, and each attention
implementation turns that into what it wants. The closures that we know are told by their code; one that is not among
them, a function of a user for example, makes the mask a table that the function itself fills.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.modeling_utils import PreTrainedModel

from fusedseq.interop.huggingface.lazy import AttentionMask
from fusedseq.nn.masks import key_lengths, readable
from fusedseq.ops import Mask

_FAR = 2**40


class Pattern(NamedTuple):
    """Which keys a query at position p sees, padding aside."""

    causal: bool = False  # none behind p
    left: int = _FAR  # none before p - left
    right: int = _FAR
    sequences: Tensor | None = None  # int [B, L]: none of another number than that of the query

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(
            self.causal or other.causal,
            min(self.left, other.left),
            min(self.right, other.right),
            other.sequences if self.sequences is None else self.sequences,
        )


def _inside(closure: Callable[..., Any]) -> dict[str, Any]:
    names = closure.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, closure.__closure__ or (), strict=True)}


_causal = masking_utils.causal_mask_function
_nothing = torch.zeros(1, 1, dtype=torch.int64)
_AND = masking_utils.and_masks(_causal).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_BOTH_SIDES = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(_nothing).__code__
_REMAPPED = masking_utils.remap_positions_for_packed_sequence(_causal, _nothing).__code__


def read(function: Callable[..., Any]) -> Pattern | None:
    """What a mask function says, or None if it is made of anything that is not known here."""
    if function is _causal:
        return Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    code = getattr(function, "__code__", None)
    if code is _WINDOW:
        return Pattern(left=_inside(function)["sliding_window"] - 1)  # key > query - window
    if code is _BOTH_SIDES:
        size = _inside(function)["sliding_window"]
        return Pattern(left=size, right=size)
    if code is not _AND:
        return None
    parts = _inside(function)["mask_functions"]
    packed = [part for part in parts if getattr(part, "__code__", None) is _PACKED]
    if len(packed) > 1:
        return None
    whole = Pattern(sequences=_inside(packed[0])["packed_sequence_mask"]) if packed else Pattern()
    for part in parts:
        if getattr(part, "__code__", None) is _PACKED:
            continue
        if getattr(part, "__code__", None) is _REMAPPED:
            remapped = _inside(part)
            # Within a sequence, positions that grow by one compare as the places in the row do.
            if whole.sequences is None or not _run_on(remapped["position_ids"], whole.sequences):
                return None
            part = remapped["mask_function"]
        said = read(part)
        if said is None or (said.sequences is not None and whole.sequences is not None):
            return None
        whole = whole & said
    return whole if whole.left >= 0 else None


def _run_on(positions: Tensor, sequences: Tensor) -> bool:
    if positions.shape != sequences.shape or not readable(positions) or not readable(sequences):
        return False
    same = sequences[:, 1:] == sequences[:, :-1]
    return bool((~same | (positions.diff(dim=-1) == 1)).all())


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = _causal,
    attention_mask: Tensor | None = None,  # bool [B, n], true for tokens, false for padding
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function of the name "fusedseq"; arguments as `masking_utils.sdpa_mask` documents them.

    Returns:
        An `AttentionMask` that holds structure (causality, window, the lengths of padded rows, sequences packed into
        one row; padding that is not on the right as a bool [B, 1, 1, S]) or a table [B, 1, L, S] where structure cannot
        say it. While a model is traced or compiled: what `sdpa_mask` returns, which may be None.

    Raises:
        ValueError: the model computes attention by itself, and would take this mask for another kind.
    """
    _refuse_other_attention(config)
    device = torch.device(device)
    common: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask,
        "use_vmap": use_vmap, "device": device,
    }  # fmt: skip
    if not readable(torch.empty(0)):
        return masking_utils.sdpa_mask(**common, **kwargs)
    structure = None
    pattern = None if use_vmap else read(mask_function)
    if pattern is not None:
        seen = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if seen is not None:
            seen = seen[:, kv_offset : kv_offset + kv_length]
        if seen is None or (seen.dtype is torch.bool and seen.shape[0] in (1, batch_size)):
            shift = int(q_offset) - int(kv_offset)
            static = isinstance(q_offset, Tensor)
            structure = _structure(pattern, batch_size, q_length, kv_length, shift, seen, static)
    if structure is not None:
        return AttentionMask(structure, (batch_size, 1, q_length, kv_length), device)
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return AttentionMask.of(masking_utils.sdpa_mask(**common, **kwargs))


def _structure(
    pattern: Pattern,
    B: int,
    L: int,
    S: int,
    shift: int,  # query i stands at key i + shift
    seen: Tensor | None,  # bool [1|B, S]
    static: bool,
) -> Mask | None:
    """The same as a Mask, or None if a Mask cannot say it.

    With a static cache a step is said like the one before, lengths apart: compiled code then serves it too.
    """
    causal, left, right, sequences = pattern
    if sequences is not None:
        if B != 1 or shift != 0 or sequences.shape != (1, L) or L != S or seen is not None:
            return None
        return Mask("top-left" if causal else None, _window(left, right, L, L), cu_seqlens=_bounds(sequences[0]))
    reached = S
    if causal:
        # The last query stands at the last of these keys; if that is not a key, no alignment fits.
        reached = L + shift
        if shift < 0 or reached > S:
            return None
        right = _FAR
    window = _window(left, right, L + abs(shift), S)
    if window is not None and shift != 0 and not causal:
        return None  # without causality a window is aligned top-left
    lengths = dense = None
    if seen is not None:
        lengths, dense = _padding(seen.expand(B, S), reached)
    if not causal:
        return Mask(None, window, key_lengths=lengths, dense=dense)
    if shift == 0:
        return Mask("top-left", window, key_lengths=lengths, dense=dense)
    if lengths is not None:  # they would move the diagonal
        dense = _as_table(seen)
    lengths = None if reached == S and not static else torch.full((B,), reached)
    if L == 1 and lengths is None and window is None:
        return Mask(dense=dense)
    return Mask("bottom-right", window, key_lengths=lengths, dense=dense)


def _window(left: int, right: int, queries: int, S: int) -> tuple[int | None, int | None] | None:
    """Without bounds that no query meets."""
    far = max(queries, S) - 1
    bounds = (None if left >= far else left, None if right >= far else right)
    return None if bounds == (None, None) else bounds


def _as_table(seen: Tensor | None) -> Tensor | None:  # [B, S] -> [B, 1, 1, S]
    return None if seen is None else seen[:, None, None, :]


def _padding(seen: Tensor, reached: int) -> tuple[Tensor | None, Tensor | None]:
    """Padding among the first `reached` keys: the lengths [B] of what is seen if it is on the right, else a table."""
    if not readable(seen):
        return None, _as_table(seen)
    first = seen[:, :reached]
    if bool(first.all()):
        return None, None
    lengths = key_lengths(~first)
    return (None, _as_table(seen)) if lengths is None else (lengths, None)


def _bounds(sequences: Tensor) -> Tensor:  # [L], non-decreasing numbers -> [N + 1]
    _, counts = torch.unique_consecutive(sequences, return_counts=True)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _refuse_other_attention(config: Any) -> None:
    """Models that do not use transformers' attention interface take a mask of numbers, and would add this one."""
    name = _computes_itself(type(config))
    if name:
        swappable = name.startswith(("Longformer", "LED"))
        swap = "; fusedseq.interop.huggingface.fuse_longformer swaps its modules" if swappable else ""
        raise ValueError(
            f"attn_implementation: expected a model that uses transformers' attention interface, got {name}, which "
            f'computes attention by itself; load it with "eager"{swap}'
        )


@torch.compiler.assume_constant_result  # TorchDynamo could not follow
def _computes_itself(config_class: type) -> str:
    return _model_that_computes_itself(config_class)


@functools.cache
def _model_that_computes_itself(config_class: type) -> str:
    """The name of a class of such a model, or "" for those that use the interface or are not known."""
    home = config_class.__module__.replace(".configuration_", ".modeling_")
    models = [
        cls
        for cls in vars(sys.modules.get(home, object)).values()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == home
    ]
    able = ("_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend", "_supports_flash_attn")
    if not models or any(getattr(cls, flag, False) for cls in models for flag in able):
        return ""
    return models[0].__name__
