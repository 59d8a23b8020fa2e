"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) under DeepSpeed. PEFT's own needs gradients and weights as they are in
plain PyTorch, and adds its penalty to a loss that the model computes itself.

A layer computes W x + B (E * A) x with B [out, r], A [r, in] and the singular values E [r, 1]. The penalty
`orth_reg_weight` * mean over all A and B of |A A' - 1| or |B' B - 1| (Frobenius norms) keeps A and B orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from torch import Tensor, nn

from distlm.worker import zero_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_ADAPTER = "default"


def add_orthogonality_gradients(peft_model: PeftModel) -> None:
    """Have every backward pass add the gradients of the penalty, which then is no part of the loss that is reported."""
    config: Any = peft_model.peft_config[_ADAPTER]
    layers = [module for module in peft_model.modules() if isinstance(module, AdaLoraLayer)]
    weight = config.orth_reg_weight / (2 * len(layers))

    def hook(layer: Any, _: Any, output: Tensor) -> Tensor:
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


def make_rank_allocation(engine: DeepSpeedEngine) -> RankAllocation | None:
    """What reduces the ranks of an engine's adapter; None: it is not of AdaLoRA."""
    is_adalora = engine.module.peft_config[_ADAPTER].peft_type == "ADALORA"
    return RankAllocation(engine) if is_adalora else None


class RankAllocation:
    """Reduces the ranks after each optimizer step of an engine, by PEFT's own rules, from whole weights and gradients.

    The gradient is the step's, averaged over workers and micro batches, before clipping; the weights are those after
    the step, as in PEFT's documentation. Every rank computes the same.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        """Hooks into `engine.step`; the engine's `global_steps` must be the run's steps."""
        self._engine = engine
        config = engine.module.peft_config[_ADAPTER]
        self._last_step = config.total_step - config.tfinal  # the one that decides over the ranks for good
        shapes = zero_state.trainable_shapes(engine)
        self._allocator = RankAllocator(_Weights({n: torch.empty(s) for n, s in shapes.items()}), config, _ADAPTER)
        # What `AdaLoraModel.update_and_allocate` uses of its model.
        self._model = SimpleNamespace(
            peft_config={_ADAPTER: config}, trainable_adapter_name=_ADAPTER, rankallocator=self._allocator, model=None
        )
        take_step = engine.step

        def step(*arguments: Any, **others: Any) -> None:
            if not engine.is_gradient_accumulation_boundary():
                take_step(*arguments, **others)
                return
            gradients = self._gradients() if engine.global_steps < self._last_step else {}
            take_step(*arguments, **others)
            self._allocate(engine.global_steps, gradients)

        engine.step = step

    def _gradients(self) -> dict[str, Tensor]:
        """Of the adapter's parameters, whole, on every rank. Collective."""
        from deepspeed.utils import safe_get_full_grad

        parameters = ((name, p) for name, p in self._engine.module.named_parameters() if _is_factor(name, p))
        # One that is not finite makes DeepSpeed skip the step, and counts for nothing here.
        return {name: torch.nan_to_num(safe_get_full_grad(p).float(), 0, 0, 0) for name, p in parameters}

    def _allocate(self, step: int, gradients: dict[str, Tensor]) -> None:
        weights = {
            name: nn.Parameter(weight)
            for name, weight in zero_state.full_weights(self._engine).items()
            if _LORA in name
        }
        for name, gradient in gradients.items():
            weights[name].grad = gradient
        before = {name: weight.detach().clone() for name, weight in weights.items() if _SINGULAR_VALUES in name}
        self._model.model = _Weights(weights)
        AdaLoraModel.update_and_allocate(self._model, step)
        changed = {name for name, values in before.items() if not torch.equal(values, weights[name])}
        if changed:
            for fragment in zero_state.fragments(self._engine):
                if fragment.name in changed:
                    end = fragment.start + fragment.numel
                    fragment.tensors["weight"].copy_(weights[fragment.name].detach().view(-1)[fragment.start : end])
            zero_state.publish_weights(self._engine)

    def state(self) -> dict[str, Tensor]:
        """What a resume needs, the same on every rank: smoothed importance and its uncertainty, in the shapes of the
        weights, and which singular values are left."""
        found = {f"exp_avg_ipt/{name}": tensor for name, tensor in self._allocator.exp_avg_ipt.items()}
        found |= {f"exp_avg_unc/{name}": tensor for name, tensor in self._allocator.exp_avg_unc.items()}
        for name, kept in (self._model.peft_config[_ADAPTER].rank_pattern or {}).items():
            found[f"rank_pattern/{name}"] = torch.tensor(kept)
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        pattern: dict[str, list[bool]] = {}
        self._allocator.reset_ipt()
        for key, tensor in state.items():
            kind, name = key.split("/", 1)
            if kind == "rank_pattern":
                pattern[name] = tensor.tolist()
            else:
                getattr(self._allocator, kind)[name] = tensor.to(self._engine.device)
                self._allocator.ipt[name] = torch.zeros(())  # known; it is computed anew in each step
        self._model.peft_config[_ADAPTER].rank_pattern = pattern or None


_LORA = ".lora_"
_SINGULAR_VALUES = ".lora_E."


def _is_factor(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and _LORA in name


class _Weights:
    """Looks like a model to PEFT's RankAllocator."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._named = named

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._named.items())
