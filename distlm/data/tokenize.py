"""Existing tokenizers: loading one, and telling it from others."""

from __future__ import annotations

import hashlib
import os

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distlm.data.foreign import reason
from distlm.errors import InputError, Problem


def load_tokenizer(name_or_path: str, needs_mask: bool = True) -> PreTrainedTokenizerFast:
    """An existing tokenizer from a folder or the Hub. One without a token for padding pads with its last token of a
    text, as is usual for causal models, where no token is masked.

    Raises InputError where it cannot be loaded, is not a fast one, or lacks what the task needs.
    """
    key = "tokenizer.name_or_path"
    if name_or_path.startswith((os.sep, ".", "~")) and not os.path.isdir(name_or_path):
        raise InputError(Problem("no such folder", key, name_or_path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # the loader raises whatever a broken file makes its parts raise
        raise InputError(
            Problem(f"the tokenizer cannot be loaded: {reason(error, whole=True)}", key, name_or_path)
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        message = "it is not a fast tokenizer (it has no tokenizer.json); use one that is, or tokenizer.train"
        raise InputError(Problem(message, key, name_or_path))
    if tokenizer.pad_token is None and not needs_mask:
        tokenizer.pad_token = tokenizer.eos_token
    needed = ("mask_token", "pad_token") if needs_mask else ("pad_token",)
    missing = [name for name in needed if getattr(tokenizer, name) is None]
    if missing:
        message = f"it has no {' and no '.join(missing)}, which the task needs; use another tokenizer"
        raise InputError(Problem(message, key, name_or_path))
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over everything that decides token ids."""
    special_ids = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    content = f"{tokenizer.backend_tokenizer.to_str()}\n{special_ids}\n{tokenizer.pad_token_id}"
    return hashlib.sha256(content.encode()).hexdigest()
