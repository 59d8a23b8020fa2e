"""bf16 products for CPU workers whose CPU has no instructions for them.

torch multiplies bf16 matrices there without any vectors, up to a hundred times slower than fp32 ones. Here autocast
still rounds both factors and the product to bf16, but the fp32 kernel computes the product. Instructions for bf16 do
the same: they multiply exactly and add up in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import library

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
"""Of what torch's autocast computes in bf16, the part that encoders use."""


@cache
def use_fp32_kernels_for_bf16() -> library.Library | None:
    """Have autocast on CPU, in this process, compute bf16 products in fp32 if torch has no fast kernels for them.

    The returned object must live as long as that shall last; the cache holds it. None: torch's own kernels are fast.
    """
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return replace_autocast_products()


def replace_autocast_products() -> library.Library:
    replacements = library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name in _PRODUCTS:
            replacements.impl(name, partial(_round_and_compute, getattr(torch.ops.aten, name)), "AutocastCPU")
    return replacements


def _round_and_compute(product: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        rounded = [_rounded(value, dtype) for value in args]
        result = product(*rounded, **{name: _rounded(value, dtype) for name, value in kwargs.items()})
        return result.to(dtype) if result.dtype == torch.float32 else result


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """The tensor in fp32 with values that `dtype` can hold; backward rounds its gradient to `dtype`, too.

    As under autocast, integers and double precision stay as they are.
    """
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype).float()
    return value
