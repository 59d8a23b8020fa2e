"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) under DeepSpeed. PEFT's own needs gradients and weights as they are in
plain PyTorch, and adds its penalty to a loss that the model computes itself.

A layer computes W x + B (E * A) x with B [out, r], A [r, in] and the singular values E [r, 1]. The penalty
`orth_reg_weight` * mean over all A and B of |A A' - 1| or |B' B - 1| (Frobenius norms) keeps A and B orthogonal.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

_ADAPTER = "default"


def add_orthogonality_gradients(peft_model: PeftModel) -> None:
    """Have every backward pass add the gradients of the penalty, which then is no part of the loss that is reported."""
    config = peft_model.peft_config[_ADAPTER]
    layers = [module for module in peft_model.modules() if isinstance(module, AdaLoraLayer)]
    weight = config.orth_reg_weight / (2 * len(layers))

    def hook(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        with_gradients: Tensor = _Penalty.apply(output, layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER], weight)
        return with_gradients

    for layer in layers:
        layer.register_forward_hook(hook)


class _Penalty(torch.autograd.Function):
    """The identity on a layer's output, which adds the penalty's gradients in the backward pass.

    There, because ZeRO-3 has the layer's weights at hand in its own forward and backward pass alone.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, a: Tensor, b: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(_norm_gradient(a.detach()), _norm_gradient(b.detach().T).T)
        ctx.weight = weight
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        of_a, of_b = ctx.saved_tensors
        return gradient, ctx.weight * of_a, ctx.weight * of_b, None


def _norm_gradient(rows: Tensor) -> Tensor:
    """Gradient of |R R' - 1| by R [r, n], in fp32; zero where the rows are orthonormal."""
    rows = rows.float()
    difference = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    return 2 * difference @ rows / difference.norm().clamp(min=1e-12)
