"""bf16 products on CPUs without instructions for them: the numbers of autocast, at the speed of fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import setuptools  # noqa: F401 - torch's compiler needs it, and it refuses to be imported once anything has imported pip
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from distlm.worker.cpu_bf16 import replace_autocast_products

LEFT, RIGHT, BIAS = (48, 200), (200, 56), (56,)

PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "linear": (lambda x, w, b: functional.linear(x, w.t(), b), [(4, *LEFT), RIGHT, BIAS]),
    "linear without bias": (lambda x, w: functional.linear(x, w.t()), [LEFT, RIGHT]),
    "matmul": (torch.matmul, [(3, 2, *LEFT), (2, *RIGHT)]),
    "matmul of a broadcast batch": (torch.matmul, [(3, 1, *LEFT), (2, *RIGHT)]),
    "matmul with a vector": (torch.matmul, [LEFT, RIGHT[:1]]),
    "linear of a vector": (lambda x, w, b: functional.linear(x, w.t(), b), [LEFT[1:], RIGHT, BIAS]),
    "mm": (torch.mm, [LEFT, RIGHT]),
    "bmm": (torch.bmm, [(3, *LEFT), (3, *RIGHT)]),
    "addmm": (torch.addmm, [BIAS, LEFT, RIGHT]),
    "baddbmm": (lambda b, x, w: torch.baddbmm(b, x, w, alpha=0.5), [(3, 1, 56), (3, *LEFT), (3, *RIGHT)]),
    "einsum": (lambda x, w: torch.einsum("bij,bjk->bik", x, w), [(3, *LEFT), (3, *RIGHT)]),
    "attention": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=False, scale=0.3),
        [(2, 3, 24, 16)] * 3,
    ),
}


@pytest.fixture
def replaced() -> Iterator[None]:
    replacements = replace_autocast_products()
    yield
    replacements._destroy()


@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients_are_those_of_autocast(replaced: None, name: str) -> None:
    """Against the same product in double precision, of the factors rounded to bf16."""
    function, shapes = PRODUCTS[name]
    torch.manual_seed(0)
    factors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [factor.detach().bfloat16().double().requires_grad_() for factor in factors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = function(*factors)
    upstream = torch.randn(product.shape).bfloat16()
    product.backward(upstream)
    expected = function(*exact)
    expected.backward(upstream.double())
    assert product.dtype == torch.bfloat16
    _assert_equal_but_for_rounding(product, expected.detach())
    for factor, exact_factor in zip(factors, exact, strict=True):
        assert factor.grad is not None and factor.grad.dtype == torch.float32
        assert torch.equal(factor.grad, factor.grad.bfloat16().float()), "rounded to bf16, as autocast does"
        _assert_equal_but_for_rounding(factor.grad, exact_factor.grad)


def _assert_equal_but_for_rounding(value: torch.Tensor, exact: torch.Tensor | None) -> None:
    """The nearest bf16 number, which has 8 bits, or its neighbour where the sum in fp32 lies just beyond the middle."""
    assert exact is not None
    torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=float(exact.abs().mean()) * 1e-3)


def test_fp32_and_bf16_outside_of_autocast_stay_as_they_are(replaced: None) -> None:
    left, right = torch.randn(16, 32), torch.randn(32, 16)
    assert (left @ right).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (left.to(torch.int32) @ right.to(torch.int32)).dtype == torch.int32
        assert (left.double() @ right.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(left @ right, torch.mm(left, right))
    assert (left @ right).dtype == torch.float32


def test_backward_keeps_the_factors_and_no_copies_of_them(replaced: None) -> None:
    """Copies in fp32 of all activations and weights would be what bf16 is meant to spare."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    inputs = torch.randn(8, 64).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            projected = layer(inputs)
            product = torch.matmul(projected, projected.mT)
        product.float().sum().backward()
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert storages == {tensor.untyped_storage().data_ptr() for tensor in (inputs, layer.weight, projected)}


def test_compiled_and_checkpointed_gradients_are_the_same(replaced: None) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 32))
    inputs = torch.randn(8, 64)

    def gradients(forward: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        layers.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = forward(inputs)
        outputs.float().square().mean().backward()
        return [parameter.grad.clone() for parameter in layers.parameters() if parameter.grad is not None]

    plain = gradients(layers)
    checkpointed = gradients(lambda inputs: checkpoint(layers, inputs, use_reentrant=False))  # type: ignore[no-any-return]
    compiled = gradients(torch.compile(layers))
    assert len(plain) == 4
    for values, others in ((checkpointed, 0.0), (compiled, 2**-7)):
        torch.testing.assert_close(values, plain, rtol=others, atol=others * 1e-2)


def test_no_kernel_multiplies_in_bf16(replaced: None) -> None:
    """Forward and backward: torch's own kernels for bf16 are a hundred times slower where this is used."""
    multiplied: set[torch.dtype] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(name in str(func) for name in ("mm", "attention")):
                multiplied.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    inputs = torch.randn(2, 8, 64, requires_grad=True)
    with Products():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            attended, _ = layer(inputs, inputs, inputs, need_weights=False)
        attended.float().sum().backward()
    assert attended.dtype == torch.bfloat16
    assert multiplied == {torch.float32}
