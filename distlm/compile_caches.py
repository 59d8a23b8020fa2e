"""Where libraries keep what they compile; by default in the home folder or in the one for temporary files."""

from __future__ import annotations

import os

from distlm.run_folder import RunFolder

_VARIABLES = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
}


def keep_compile_caches(run: RunFolder) -> None:
    """Have this process, and those that it starts, keep them in the cache that runs share, unless the user has said
    otherwise. To be called before torch is imported."""
    for variable, name in _VARIABLES.items():
        os.environ.setdefault(variable, str(run.cache / "libraries" / name))
