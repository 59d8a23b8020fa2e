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
            kernel = _linear if name == "linear" else partial(_product, getattr(torch.ops.aten, name))
            replacements.impl(name, kernel, "AutocastCPU")
    return replacements


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    operator = torch.ops.aten.linear
    if not _are_matrices(input, weight):
        return _product(operator, input, weight, bias)
    with torch.autocast("cpu", enabled=False):
        dtype = torch.get_autocast_dtype("cpu")
        return _MatMul.apply(lambda left, right, bias: operator(left, right.t(), bias), input, weight.t(), bias, dtype)


def _product(operator: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        if len(args) == 2 and not kwargs and _are_matrices(*args):
            return _MatMul.apply(lambda left, right, bias: operator(left, right), *args, None, dtype)
        rounded = [_rounded(value, dtype) for value in args]
        result = operator(*rounded, **{name: _rounded(value, dtype) for name, value in kwargs.items()})
        return result.to(dtype) if result.dtype == torch.float32 else result


class _MatMul(torch.autograd.Function):
    """`left @ right + bias`. Backward gets the factors as they came, not copies in the fp32 they are multiplied in."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Callable[..., torch.Tensor],
        left: torch.Tensor,
        right: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        ctx.dtype = dtype
        return operator(_rounded(left, dtype), _rounded(right, dtype), _rounded(bias, dtype)).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, right = (_rounded(factor, ctx.dtype) for factor in ctx.saved_tensors)
        _, needs_left, needs_right, needs_bias, _ = ctx.needs_input_grad
        grad = grad.float()
        grad_left = grad_right = grad_bias = None
        if needs_left:
            grad_left = torch.matmul(grad, right.mT).sum_to_size(left.shape).to(ctx.dtype)
        if needs_right and right.dim() == 2:
            # Transposed: right is the transposed weight, and the gradient of the weight comes out contiguous.
            grad_right = (grad.flatten(0, -2).t() @ left.flatten(0, -2)).t().to(ctx.dtype)
        elif needs_right:
            grad_right = torch.matmul(left.mT, grad).sum_to_size(right.shape).to(ctx.dtype)
        if needs_bias:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.dtype)
        return None, grad_left, grad_right, grad_bias, None


def _are_matrices(*factors: Any) -> bool:
    return all(_gets_rounded(factor) and factor.dim() >= 2 for factor in factors)


def _gets_rounded(value: Any) -> bool:
    """Integers and double precision stay as they are, as under autocast."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """The tensor in fp32 with values that `dtype` can hold; backward rounds its gradient to `dtype`, too."""
    return value.to(dtype).float() if _gets_rounded(value) else value
