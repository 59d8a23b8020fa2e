"""Dropout on CPU: how many elements, how scaled, from which numbers; and attention with it or in bf16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distlm.worker.cpu_layers import Dropout, attention, dropout, use_cpu_layers


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_scale_and_gradient(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ones = torch.ones(1001, 999, dtype=dtype, requires_grad=True)  # no multiple of 4 elements
    result = dropout(ones, p)
    is_dropped = result == 0
    deviation = (p * (1 - p) / ones.numel()) ** 0.5
    assert float(is_dropped.float().mean()) == pytest.approx(p, abs=5 * deviation + 1e-5)
    assert result[~is_dropped].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-2)
    neighbours = (is_dropped[:, 1:] & is_dropped[:, :-1]).float().mean()
    assert float(neighbours) == pytest.approx(p * p, abs=5 * p / 1000), "elements are independent"
    result.sum().backward()
    assert ones.grad is not None and torch.equal(ones.grad, result)


def test_everything_can_be_dropped_and_nothing() -> None:
    ones = torch.ones(64)
    assert not dropout(ones, 1.0).any()
    layer = Dropout(0.5).eval()
    assert layer(ones) is ones


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout(torch.ones(1000), 0.3)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.fixture
def own_attention() -> Iterator[None]:
    yield
    del ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_without_dropout_is_that_of_torch(is_padded: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 16, 8)  # B = 2, 4 heads, S = 16, D = 8
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[1, :, :, 10:] = False
    given = mask if is_padded else None
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=given).transpose(1, 2)
    assert torch.allclose(attention(nn.Module(), query, key, value, given, 0.0, None), expected, atol=1e-6)


@pytest.mark.parametrize("positions", [24, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_attention_in_bf16_is_not_fused(
    own_attention: None, dtype: torch.dtype, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of double precision however it is computed."""
    fused = nn.functional.scaled_dot_product_attention
    computed_by: list[str] = []
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: computed_by.append("torch") or fused(*a, **k)
    )
    use_cpu_layers(nn.Module())
    torch.manual_seed(0)
    module = nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    inputs = torch.randn(3, 2, 4, positions, 8).to(dtype)
    given, exact = inputs.clone().requires_grad_(), inputs.double().requires_grad_()
    result, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *given, None)
    expected = fused(*exact).transpose(1, 2)
    upstream = torch.randn(result.shape).to(dtype)
    result.backward(upstream)
    expected.backward(upstream.double())
    assert result.dtype == dtype
    assert computed_by == ([] if dtype == torch.bfloat16 and positions == 24 else ["torch"])
    assert given.grad is not None and exact.grad is not None
    for computed, true in ((result.detach(), expected.detach()), (given.grad, exact.grad)):
        error = float((computed.double() - true).norm() / true.norm())
        assert error < (2**-7 if dtype == torch.bfloat16 else 1e-6)


def test_a_model_draws_all_of_its_dropout_here(own_attention: None) -> None:
    """With every probability 1, nothing but the biases is left; in evaluation nothing is dropped."""
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config)
    input_ids = torch.arange(20).view(2, 10)
    reference = model.eval()(input_ids=input_ids).logits
    use_cpu_layers(model)
    assert not [module for module in model.modules() if type(module) is nn.Dropout]
    assert torch.equal(model(input_ids=input_ids).logits, reference)
    model.train()
    torch.manual_seed(1)
    first = model(input_ids=input_ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(input_ids=input_ids).logits, first) and not torch.equal(first, reference)
    attention_layer = model.bert.encoder.layer[0].attention.self
    attention_layer.dropout.p = 1.0
    context = attention_layer(torch.randn(2, 10, 16))[0]
    assert not context.any(), "attention probabilities are dropped by the same function"
