"""DeepSpeed engines on two gloo processes against a plain PyTorch loop, at every ZeRO stage."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny_training import (
    LEARNING_RATE,
    MICRO_BATCH_SIZE,
    MICRO_BATCHES_PER_STEP,
    WORLD_SIZE,
    fresh_engine,
    load_model,
    loss_sum,
    micro_batch,
    num_masked_tokens,
    plain_curve,
    settings,
    train_step,
    write_initial_weights,
)

from distlm.errors import AttestationError, InputError
from distlm.worker import engine as engine_module
from distlm.worker import shared_memory, zero_state
from distlm.worker.attest import Expected, attest, gather_facts
from distlm.worker.cpu_bf16 import use_fp32_kernels_for_bf16
from distlm.worker.engine import (
    EngineSettings,
    backward,
    deepspeed_config,
    full_shape,
    global_grad_norm,
    parameter_groups,
    set_learning_rate,
)

STAGES = (0, 1, 2, 3)
NUM_STEPS = 50
MAX_GRAD_NORM = 0.5
"""Below the norm at most steps, so that clipping is at work."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in the ranks. Two threads that wait for busy cores make the plain loop 30 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_initial_weights(tmp_path_factory.mktemp("init"))


def curves(init: Path, cases: list[tuple[EngineSettings, int]]) -> list[tuple[list[float], list[float]]]:
    """(losses, gradient norms) per pair of settings and number of steps; runs on each rank."""
    results = []
    for case, num_steps in cases:
        accelerator, engine = fresh_engine(case, init)
        losses, norms = [], []
        for step in range(num_steps):
            losses.append(train_step(accelerator, engine, step))
            norms.append(global_grad_norm(engine))
        results.append((losses, norms))
    return results


def largest_difference(left: list[float], right: list[float]) -> float:
    """Over the steps that both have."""
    return max(abs(a - b) for a, b in zip(left, right, strict=False))


def test_fp32_matches_a_plain_loop_at_every_stage(init: Path) -> None:
    cases = [(settings(stage, max_grad_norm=MAX_GRAD_NORM), NUM_STEPS) for stage in STAGES]
    offload: dict[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "offload_optimizer_device": "cpu"}
    cases += [(settings(2, **offload), 8), (settings(3, **offload, offload_param_device="cpu"), 8)]
    plain_losses, plain_norms = plain_curve(init, NUM_STEPS, MAX_GRAD_NORM)
    assert sum(norm > MAX_GRAD_NORM for norm in plain_norms) > NUM_STEPS // 2
    for losses, norms in run_on_ranks(curves, WORLD_SIZE, init, cases)[0]:
        assert largest_difference(losses, plain_losses) < 1e-5
        assert largest_difference(norms, plain_norms) < 1e-5
    assert plain_losses[-1] < plain_losses[0] - 0.1


def curves_in_pieces(init: Path, cases: list[tuple[EngineSettings, int]]) -> tuple[list[Any], int]:
    """The curves where all that passes between the workers does so through shared memory, in pieces of 1 KiB, and how
    many pieces there were."""
    num_pieces = 0

    class Counted(shared_memory.SharedMemory):
        def _next_halves(self, chunk: torch.Tensor) -> list[torch.Tensor]:
            nonlocal num_pieces
            num_pieces += 1
            return super()._next_halves(chunk)

    shared_memory._WORTH_IT_BYTES, shared_memory._SEGMENT_BYTES = 0, 2048
    engine_module.SharedMemory, engine_module._NORM_NUMEL = Counted, 100  # type: ignore[misc]
    return curves(init, cases), num_pieces


def test_it_matches_where_tensors_are_larger_than_every_buffer(init: Path) -> None:
    """Sizes that large models meet: gradients larger than the bucket, the shared memory and a piece of the norm."""
    cases = [(settings(stage, max_grad_norm=MAX_GRAD_NORM, num_parameters=500), 8) for stage in STAGES]
    plain_losses, plain_norms = plain_curve(init, 8, MAX_GRAD_NORM)
    for results, num_pieces in run_on_ranks(curves_in_pieces, WORLD_SIZE, init, cases):
        assert num_pieces > 100
        for losses, norms in results:
            assert largest_difference(losses, plain_losses) < 1e-5
            assert largest_difference(norms, plain_norms) < 1e-5


def test_bf16_gives_the_same_curve_at_every_stage(init: Path) -> None:
    cases = [(settings(stage, "bf16", max_grad_norm=MAX_GRAD_NORM), 12) for stage in STAGES]
    plain_losses, plain_norms = plain_curve(init, NUM_STEPS, MAX_GRAD_NORM, bf16=True)
    for losses, norms in run_on_ranks(curves, WORLD_SIZE, init, cases)[0]:
        assert largest_difference(losses, plain_losses) < 3e-3  # DeepSpeed's own bf16 at stage 0 is off by 1e-2
        assert largest_difference(norms, plain_norms) < 3e-2
    fp32_losses, _ = plain_curve(init, NUM_STEPS, MAX_GRAD_NORM)
    assert largest_difference(plain_losses, fp32_losses) > 1e-5  # the plain loop did run in bf16


SAMPLES_PER_WORKER = 12
DIFFERENT_COUNTS = (1, 3, 2, 12, 1)
"""Micro batches of a worker, step by step."""


def weights_of_counts(init: Path, case: EngineSettings, counts: Sequence[int], by_counting: bool) -> list[torch.Tensor]:
    """This rank's fp32 weights after a step for each of the counts, in which the step's samples are cut into so many
    micro batches. `by_counting`: with `accelerator.accumulate`, which knows one count only."""
    accelerator, engine = fresh_engine(case, init)
    for step, count in enumerate(counts):
        batches = [micro_batch(step, index) for index in range(WORLD_SIZE * SAMPLES_PER_WORKER // MICRO_BATCH_SIZE)]
        scale = WORLD_SIZE * case.gradient_accumulation_steps / num_masked_tokens(batches)
        input_ids, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        mine = slice(torch.distributed.get_rank(), None, WORLD_SIZE)
        pieces = list(zip(input_ids[mine].chunk(count), labels[mine].chunk(count), strict=True))
        set_learning_rate(engine, LEARNING_RATE)
        for number, piece in enumerate(pieces, 1):
            if by_counting:
                with accelerator.accumulate(engine):
                    accelerator.backward(loss_sum(engine, *piece) * scale)
            else:
                backward(accelerator, loss_sum(engine, *piece) * scale, is_last=number == count)
    return [flat.detach().clone() for flat in zero_state.flat_weights(engine)]


def compare_counts(init: Path, cases: list[EngineSettings]) -> list[dict[str, float]]:
    """Per case: how far this rank's weights are from those after as many micro batches as the settings say, counted by
    Accelerate."""
    num_steps = len(DIFFERENT_COUNTS)
    results = []
    for case in cases:
        constant = [case.gradient_accumulation_steps] * num_steps
        accumulated = weights_of_counts(init, case, constant, by_counting=True)
        others = {"constant": constant, "whole": [1] * num_steps, "different": DIFFERENT_COUNTS, "untrained": ()}
        differences = {}
        for name, counts in others.items():
            pairs = zip(weights_of_counts(init, case, counts, by_counting=False), accumulated, strict=True)
            differences[name] = max(float((a - b).abs().max()) for a, b in pairs)
        results.append(differences)
    return results


def test_a_step_may_have_any_number_of_micro_batches(init: Path) -> None:
    """The update is that of the same samples in one micro batch. Where the number is constant, every bit is as with
    `accelerator.accumulate`."""
    cases = [EngineSettings(stage, "no", 2, SAMPLES_PER_WORKER // 2) for stage in STAGES]
    cases += [replace(case, offload_optimizer_device="cpu") for case in cases[2:]]
    for results in run_on_ranks(compare_counts, WORLD_SIZE, init, cases):
        for difference in results:
            assert difference["constant"] == 0.0
            assert difference["whole"] < 1e-6
            assert difference["different"] < 1e-6
            assert difference["untrained"] > 1e-3


def engine_checks(init: Path, stage: int) -> dict[str, Any]:
    """What one rank sees of an engine that it set up in bf16 without clipping."""
    accelerator, engine = fresh_engine(settings(stage, "bf16", max_grad_norm=0.0), init)
    result: dict[str, Any] = {
        "workers": (accelerator.num_processes, accelerator.process_index, str(accelerator.device)),
        "mlflow": sys.modules.get("mlflow") is not None,
        "bf16 kernels chosen": use_fp32_kernels_for_bf16.cache_info().currsize,
        "dtypes": {str(parameter.dtype) for parameter in engine.module.parameters()},
        "groups": [group["weight_decay"] for group in engine.optimizer.param_groups],
        "partitioned": all(hasattr(parameter, "ds_id") for parameter in engine.module.parameters()),
    }
    result["losses"] = [train_step(accelerator, engine, 0, learning_rate=rate) for rate in (0.0, LEARNING_RATE, 0.0)]
    result["norm"] = global_grad_norm(engine)
    before = [flat.detach().clone() for flat in zero_state.flat_weights(engine)]
    train_step(accelerator, engine, 0, loss_factor=math.inf)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, zero_state.flat_weights(engine), strict=True))
    result["after a non-finite gradient"] = math.isfinite(global_grad_norm(engine)), unchanged

    rank = torch.distributed.get_rank()
    batch, world = MICRO_BATCH_SIZE, WORLD_SIZE
    dealt = range(rank, MICRO_BATCHES_PER_STEP, world)
    positions = [index * batch + offset for index in dealt for offset in range(batch)]
    facts = gather_facts(engine, accelerator, positions, {0: "same", 5: "everywhere"})
    expectations = {s: Expected(world, s, "cpu", 0, MICRO_BATCHES_PER_STEP * batch) for s in STAGES}
    for expected_stage, expectation in expectations.items():
        try:
            attest(facts, expectation)
            result[f"attest {expected_stage}"] = "passed"
        except AttestationError as error:
            result[f"attest {expected_stage}"] = str(error)
    return result


def all_engine_checks(init: Path, stages: Sequence[int]) -> dict[int, dict[str, Any]]:
    return {stage: engine_checks(init, stage) for stage in stages}


@pytest.mark.parametrize(("group_exists", "stages"), [(True, STAGES), (False, (2,))])
def test_engines_are_what_was_asked_for(init: Path, group_exists: bool, stages: Sequence[int]) -> None:
    """Where the process group exists already, as in a Ray Train worker, and where it does not, as under torchrun."""
    ranks = run_on_ranks(all_engine_checks, WORLD_SIZE, init, stages, join_process_group=group_exists)
    for rank, by_stage in enumerate(ranks):
        for stage, seen in by_stage.items():
            assert seen["workers"] == (WORLD_SIZE, rank, "cpu")
            assert not seen["mlflow"]
            assert seen["bf16 kernels chosen"]
            assert seen["dtypes"] == {"torch.float32"}
            assert seen["groups"] == [0.1, 0.0]
            assert seen["partitioned"] == (stage == 3)
            before, same, changed = seen["losses"]
            assert before == same, "a learning rate of 0 must leave the weights alone"
            assert changed < same - 1e-3
            assert 0.1 < seen["norm"] < 10
            assert seen["after a non-finite gradient"] == (False, True), "the norm tells, the weights stay"
            for other in STAGES:
                if other == stage:
                    assert seen[f"attest {other}"] == "passed"
                else:
                    wrong = f"rank 0 runs ZeRO stage {stage}, the config asks for {other}"
                    assert wrong in seen[f"attest {other}"]


def loaded_at_stage_3(folders: dict[str, Path]) -> dict[str, tuple[bool, list[str], bool, list[int]]]:
    """Per model: whether all of it is partitioned, which weights differ from the file, whether tied, group sizes."""
    import deepspeed
    from safetensors.torch import load_file

    from distlm.worker.engine import make_accelerator

    make_accelerator(settings(3))
    results = {}
    for name, folder in folders.items():
        model = load_model(folder)
        saved = load_file(folder / "model.safetensors")
        partitioned = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
        differing = []
        for parameter_name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if not torch.equal(parameter, saved[parameter_name]):
                    differing.append(parameter_name)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        sizes = [sum(full_shape(p).numel() for p in group["params"]) for group in parameter_groups(model, 0.1)]
        results[name] = partitioned, differing, tied, sizes
    return results


def test_from_pretrained_at_stage_3_is_the_file(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig, DistilBertConfig, ModernBertConfig, RobertaConfig

    common = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    configs = {
        "bert": BertConfig(**common, intermediate_size=64),
        "roberta": RobertaConfig(**common, intermediate_size=64),
        "modernbert": ModernBertConfig(**common, intermediate_size=64, **tokens),
        "distilbert": DistilBertConfig(vocab_size=200, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    }
    groups_of_whole_models = {}
    for name, config in configs.items():
        AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / name)
        whole = parameter_groups(load_model(tmp_path / name), 0.1)
        groups_of_whole_models[name] = [sum(p.numel() for p in group["params"]) for group in whole]
    results = run_on_ranks(loaded_at_stage_3, WORLD_SIZE, {name: tmp_path / name for name in configs})
    for result in results:
        for name, (partitioned, differing, tied, sizes) in result.items():
            assert (partitioned, differing, tied) == (True, [], True), name
            assert sizes == groups_of_whole_models[name], name


def test_biases_and_norms_are_not_decayed(init: Path) -> None:
    model = load_model(init)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = (
        [names[id(parameter)] for parameter in group["params"]] for group in parameter_groups(model, 0.1)
    )
    assert sorted(decayed + undecayed) == sorted(names.values())
    assert all("LayerNorm" in name or name.endswith("bias") for name in undecayed)
    assert not any("LayerNorm" in name or name.endswith("bias") for name in decayed)


def test_the_deepspeed_dictionary_is_plain_and_complete() -> None:
    for stage in STAGES:
        for precision in ("no", "bf16"):
            text = json.dumps(deepspeed_config(settings(stage, precision)))
            assert "auto" not in text.replace("torch_autocast", "")
            assert '"grad_accum_dtype": "fp32"' in text


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (settings(4), "zero_stage"),
        (settings(2, "fp16"), "mixed_precision"),
        (settings(0, "fp16", device="cuda"), "mixed_precision"),
        (settings(0, offload_optimizer_device="cpu"), "offload_optimizer_device"),
        (settings(2, offload_param_device="cpu"), "offload_param_device"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: EngineSettings, key: str) -> None:
    with pytest.raises(InputError) as refused:
        deepspeed_config(wrong)
    assert [problem.key for problem in refused.value.problems] == [key]
