"""Models, tokenizers and adapters that others have made: nothing in them is executed.

Their loaders are told `trust_remote_code=False`, or else they would ask on the terminal, and read pickled weights with
torch's `weights_only`, which refuses all but tensors.
"""

from __future__ import annotations

import pickle


def reason(error: BaseException, *, whole: bool = False) -> str:
    """Why a library did not load something, in one line: the first of the library's, or its `whole` text, unless that
    advises to trust what is loaded."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it needs Python code of its own, which is never run; use one whose class is a part of transformers"
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in text:
        return "its weights are a pickle that holds more than tensors, which is never run; use one with .safetensors"
    return (text if whole else next(iter(str(error).strip().splitlines()), "")) or type(error).__name__
