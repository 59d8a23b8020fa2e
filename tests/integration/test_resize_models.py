"""Checkpoints of models that are no plain BERT: LoRA, parameters of a few elements, without gradient or without
elements. Each is written on 2 and on 3 ranks and read on 3 and on 1, by another ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from saved_state import saved_state
from tiny_training import (
    MICRO_BATCH_SIZE,
    VOCAB_SIZE,
    engine_of,
    load_model,
    loss_sum,
    train_step,
    write_initial_weights,
)
from torch import Tensor, nn

from distlm.checkpoint.manifest import Progress
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.errors import InputError
from distlm.worker import engine as engine_module
from distlm.worker.checkpoint import CheckpointSaver, load_checkpoint
from distlm.worker.engine import EngineSettings

SEED = 5
NUM_MICRO_BATCHES = 6  # on 1, 2 and 3 ranks: 6, 3 and 2 accumulation steps
CUT, END = 2, 4


# --- models ----------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Odd numbers of elements, which no number of ranks above 1 divides, and a layer that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 5)
        self.unused = nn.Linear(3, 1)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(numbers[:, :7]))))


class Minute(nn.Module):
    """Parameters of 1 and 2 elements: fewer than ranks. On 3 ranks one holds nothing of most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(1, 1), nn.LayerNorm(2)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.norm(torch.cat([self.first(numbers[:, :1]), numbers[:, 1:2]], dim=1))


class Empty(Minute):
    """One parameter has no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(2, 0))

    def forward(self, numbers: Tensor) -> Tensor:
        return torch.cat([super().forward(numbers), numbers[:, :2] @ self.nothing], dim=1)


def lora(init: Path) -> nn.Module:
    """Adapters in a frozen BERT, and a layer of its head that trains whole."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "value"], modules_to_save=["transform"])
    return get_peft_model(load_model(init), config)


MODELS: dict[str, Callable[[Path], nn.Module]] = {
    "lora": lora,
    "odd": lambda init: Odd(),
    "minute": lambda init: Minute(),
    "empty": lambda init: Empty(),
}


def squares(engine: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    return (engine(input_ids.float() / VOCAB_SIZE) - 0.3).square().sum()


# --- engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A ZeRO stage, and settings of it that tiny models need to meet what large ones meet."""

    stage: int
    zero_options: tuple[tuple[str, Any], ...] = ()


VARIANTS = {
    "0": Variant(0),
    "1": Variant(1),
    "2": Variant(2),
    # Every parameter below 100,000 elements stays gathered between steps; sub-groups hold a billion.
    "3": Variant(3),
    "3 partitioned": Variant(3, (("stage3_param_persistence_threshold", 20), ("sub_group_size", 100))),
    "2 offloaded": Variant(2, (("offload_optimizer", {"device": "cpu"}),)),
    "3 offloaded": Variant(3, (("offload_optimizer", {"device": "cpu"}), ("offload_param", {"device": "cpu"}))),
}
CASES = [(m, v) for m in MODELS for v in VARIANTS if not (m == "empty" and VARIANTS[v].stage == 3)]


class Trainer:
    """A fresh engine of a variant of a model. `seed` decides what of its weights is drawn, not loaded."""

    def __init__(self, model: str, variant: str, init: Path, seed: int) -> None:
        def make_model() -> nn.Module:
            torch.manual_seed(seed)
            return MODELS[model](init)

        world_size = torch.distributed.get_world_size()
        settings = EngineSettings(
            VARIANTS[variant].stage, "no", NUM_MICRO_BATCHES // world_size, MICRO_BATCH_SIZE, max_grad_norm=0.0
        )
        plain_config = engine_module.deepspeed_config
        with pytest.MonkeyPatch.context() as patch:

            def config(settings: EngineSettings) -> dict[str, Any]:
                config = plain_config(settings)
                config["zero_optimization"].update(VARIANTS[variant].zero_options)
                return config

            patch.setattr(engine_module, "deepspeed_config", config)
            self.accelerator, self.engine = engine_of(settings, make_model)
        self.loss_of = loss_sum if model == "lora" else squares

    def train(self, first_step: int, last_step: int) -> list[float]:
        """The losses of these steps; steps count from 1."""
        return [
            train_step(self.accelerator, self.engine, step, num_micro_batches=NUM_MICRO_BATCHES, loss_of=self.loss_of)
            for step in range(first_step, last_step + 1)
        ]

    def save(self, folder: Path, step: int) -> None:
        saver = CheckpointSaver(self.engine, CheckpointStore(folder), seed=SEED)
        saver.save(step, Progress(sample_position=step, epoch=0))
        saver.wait()


def at(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(step, folder / f"step-{step:08d}")


# --- what the ranks do -----------------------------------------------------------------------------------------------

Losses = dict[tuple[str, str], list[float]]


def write(folder: Path, init: Path) -> dict[str, Losses]:
    """Train and save each case, and again from its checkpoint in the middle on, from other weights. Returns the losses
    after the checkpoint of both."""
    whole: Losses = {}
    resumed: Losses = {}
    for case in CASES:
        path = folder / "-".join(case)
        trainer = Trainer(*case, init, seed=0)
        trainer.train(1, CUT)
        trainer.save(path, CUT)
        whole[case] = trainer.train(CUT + 1, END)
        trainer.save(path, END)
        resumed[case] = read(path, path / "again", case, init)
    return {"whole": whole, "resumed": resumed}


def read(source: Path, folder: Path, case: tuple[str, str], init: Path) -> list[float]:
    """Load the checkpoint in the middle, save it again, train on. Returns the losses."""
    trainer = Trainer(*case, init, seed=1)
    load_checkpoint(trainer.engine, at(source, CUT), seed=SEED)
    trainer.save(folder, CUT)
    losses = trainer.train(CUT + 1, END)
    trainer.save(folder, END)
    return losses


def read_all(source: Path, folder: Path, init: Path, cases: Sequence[tuple[str, str]]) -> Losses:
    """Each case from the checkpoint of the case before it, of the same model."""
    return {case: read(source / "-".join(writer_of(case)), folder / "-".join(case), case, init) for case in cases}


def writer_of(case: tuple[str, str]) -> tuple[str, str]:
    """The case of another variant whose checkpoint is read."""
    of_model = [other for other in CASES if other[0] == case[0]]
    return of_model[of_model.index(case) - 1]


def write_and_read(source: Path, folder: Path, init: Path) -> dict[str, Losses]:
    return write(folder, init) | {"read": read_all(source, folder / "read", init, CASES)}


@dataclass(frozen=True)
class Trained:
    folder: Path
    losses: dict[str, Losses]


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_initial_weights(tmp_path_factory.mktemp("init"), dropout=0.1)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory, init: Path) -> Trained:
    folder = tmp_path_factory.mktemp("two")
    return Trained(folder, run_on_ranks(write, 2, folder, init)[0])


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory, init: Path, on_two: Trained) -> Trained:
    folder = tmp_path_factory.mktemp("three")
    return Trained(folder, run_on_ranks(write_and_read, 3, on_two.folder, folder, init)[0])


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory, init: Path, on_three: Trained) -> Trained:
    folder = tmp_path_factory.mktemp("one")
    losses = run_on_ranks(read_all, 1, on_three.folder, folder / "read", init, CASES)[0]
    return Trained(folder, {"read": losses})


# --- tests -----------------------------------------------------------------------------------------------------------


def state_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.path.glob("shard-*")}


def require_close(one: dict[tuple[str, str], Tensor], other: dict[tuple[str, str], Tensor]) -> None:
    """Up to the order of fp32 sums; the norm over 2 elements in Minute magnifies what they differ by."""
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(
            other[key], one[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(("model", "variant"), CASES)
def test_the_same_setup_gives_the_same_bits(
    on_two: Trained, on_three: Trained, model: str, variant: str, num_ranks: int
) -> None:
    trained = on_two if num_ranks == 2 else on_three
    folder = trained.folder / f"{model}-{variant}"
    for step in (CUT, END):
        files = state_files(at(folder, step))
        assert state_files(at(folder / "again", step)) == files, step
        assert len(files) == num_ranks
    assert state_files(at(folder, CUT)) != state_files(at(folder, END)), "something is learned"
    assert trained.losses["resumed"][model, variant] == trained.losses["whole"][model, variant]


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_another_size_and_stage_reads_the_same_state_and_trains_the_same(
    on_two: Trained, on_three: Trained, on_one: Trained, model: str, variant: str
) -> None:
    writer = writer_of((model, variant))
    for source, target in ((on_two, on_three), (on_three, on_one)):
        written, read = source.folder / "-".join(writer), target.folder / "read" / f"{model}-{variant}"
        before, after = saved_state(at(written, CUT).path), saved_state(at(read, CUT).path)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert target.losses["read"][model, variant] == pytest.approx(source.losses["whole"][writer], rel=1e-6)
        require_close(saved_state(at(written, END).path), saved_state(at(read, END).path))


@pytest.mark.parametrize("model", MODELS)
def test_all_stages_train_the_same(on_three: Trained, model: str) -> None:
    """Also what never gets a gradient: it decays at every stage."""
    states = [saved_state(at(on_three.folder / "-".join(case), END).path) for case in CASES if case[0] == model]
    for state in states[1:]:
        require_close(states[0], state)
    if model == "odd":
        assert not states[0]["unused.weight", "exp_avg"].any()


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_of_a_lora_model_only_what_trains_is_saved(
    on_two: Trained, on_three: Trained, init: Path, variant: str, num_ranks: int
) -> None:
    checkpoint = at((on_two if num_ranks == 2 else on_three).folder / f"lora-{variant}", END)
    model = lora(init)
    expected = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 2 * 2 * 2 + 4, "A and B of 2 matrices in 2 layers; weight and bias of a matrix and a norm"
    manifest = CheckpointStore(checkpoint.path.parent).verify(checkpoint)
    assert manifest.shapes == expected
    assert list(manifest.shapes) == list(expected), "by the same names, in the same order, at every stage"
    num_elements = 2 * 2 * 2 * 4 * 32 + 32 * 32 + 3 * 32
    assert sum(tensor.nbytes for tensor in saved_state(checkpoint.path).values()) == 12 * num_elements
    assert manifest.size_bytes < 12 * num_elements + 200 * 3 * len(expected) * num_ranks, "and their names"
    assert manifest.size_bytes < 12 * sum(p.numel() for p in model.parameters()) / 6


def train_empty_at_stage_3(init: Path) -> str:
    with pytest.raises(InputError) as refused:
        Trainer("empty", "3", init, seed=0)
    return str(refused.value)


def test_a_parameter_without_elements_is_refused_at_stage_3(init: Path) -> None:
    (error,) = run_on_ranks(train_empty_at_stage_3, 1, init)
    assert "deepspeed.zero_stage" in error
    assert "the parameter nothing of the model has no elements, which stage 3 cannot train; use 0, 1 or 2" in error
