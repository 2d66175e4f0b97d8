"""fusedseq in models of Hugging Face transformers.

`register` adds an attention implementation that every model can be given whose attention goes through transformers'
interface; `fuse_longformer` swaps the self-attention of Longformer and LED, which does not.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError('fusedseq.interop.huggingface needs transformers: pip install "fusedseq[huggingface]"') from error

from fusedseq.interop.huggingface.attention import attention_forward, register
from fusedseq.interop.huggingface.longformer import fuse_longformer
from fusedseq.interop.huggingface.masks import attention_mask

__all__ = ["attention_forward", "attention_mask", "fuse_longformer", "register"]
