"""Dropout (Srivastava et al. 2014) and attention for CPU workers, several times faster than torch's.

torch draws one number after the other for each element on CPU, which takes as long as a matrix product in small
models. Here four elements share one draw of 64 bits. The numbers come from torch's generator, so `torch.manual_seed`
and activation checkpointing decide over them as over torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_VALUES = 2**16  # of the random number of one element; the dropout probability is rounded to a multiple of 1/65536
_UNFUSED_UP_TO = 256  # positions: fused attention in bf16 takes twice the time there, and the scores little memory


def dropout(tensor: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element with probability `p`, and scale the others by 1 / (1 - p)."""
    numel, num_dropped = tensor.numel(), round(p * _VALUES)
    if not num_dropped:
        return tensor
    draws = torch.empty(-(-numel // 4), dtype=torch.int64).random_(-(2**63), None)
    # Compared in place and multiplied as int8: torch's kernels for these are vectorised, those with bool are not.
    is_kept = draws.view(torch.int16)[:numel].gt_(num_dropped - _VALUES // 2 - 1).to(torch.int8).view(tensor.shape)
    return (tensor * is_kept).mul_(_VALUES / max(_VALUES - num_dropped, 1))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` for tensors on the CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropout(input, self.p) if self.training else input


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout_p: float,
    scaling: float | None,
) -> torch.Tensor:
    """Scaled dot-product attention of every position to every position that the mask [B, 1, S, S] lets it see.

    [B, heads, S, D] -> [B, S, heads, D]. On CPU, torch has no fused kernel with dropout, and none with fast products of
    bf16. The softmax adds up in fp32 whatever the dtype.
    """
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(-1, -2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = dropout(scores.softmax(-1), dropout_p)
    return (probabilities.to(value.dtype) @ value).transpose(1, 2).contiguous()


def use_cpu_layers(model: nn.Module) -> None:
    """Have a model, and every `sdpa` attention of transformers in this process, computed by this module."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
    _replace_sdpa()


def _replace_sdpa() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def sdpa(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        looks_ahead = not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        has_extras = any(others.get(name) is not None for name in ("position_bias", "softcap", "cache"))
        is_faster = dropout > 0 or (query.dtype == torch.bfloat16 and query.shape[2] <= _UNFUSED_UP_TO)
        if is_faster and looks_ahead and query.shape == key.shape and not has_extras:
            return attention(module, query, key, value, attention_mask, dropout, scaling), None
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return result

    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
