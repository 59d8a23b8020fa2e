"""A run whose world size, ZeRO stage and offloading change from attempt to attempt trains what it would have trained
without an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from place import Place
from tiny_runs import GLOBAL_BATCH, Base, Finished, Training, largest_difference, make_base, train_all

from distlm.checkpoint.manifest import Manifest
from distlm.checkpoint.store import CheckpointStore
from distlm.errors import ExitCode

STEPS = 20
WORKERS = (1, 3, 2)
"""Of the attempts: 6, 2 and 3 accumulation steps."""
LAST_STEPS = (7, 14, STEPS)
"""Of the attempts."""

PRECISION = {
    "no": ("training.mixed_precision=no",),
    # Slower, so that the differences that come from rounding do not grow over the steps.
    "bf16": ("training.mixed_precision=bf16", "training.learning_rate=2e-3"),
}
OFFLOADED_OPTIMIZER = ("deepspeed.offload_optimizer_device=cpu",)
OFFLOADED_PARAMETERS = ("deepspeed.offload_param_device=cpu",)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("resize"))


def manifest_at(finished: Finished, step: int) -> Manifest:
    return CheckpointStore(finished.training.run.checkpoints).manifest(finished.training.saved_at(step))


# --- another size and another stage at each resume -------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """A run in three attempts on WORKERS: the ZeRO stage and the other overrides of each."""

    stages: tuple[int, int, int]
    others: tuple[tuple[str, ...], ...] = ((), (), ())
    mixed_precision: str = "no"

    def overrides(self, attempt: int) -> tuple[str, ...]:
        return (
            *PRECISION[self.mixed_precision],
            f"training.max_steps={LAST_STEPS[attempt]}",
            f"resources.num_workers={WORKERS[attempt]}",
            f"deepspeed.zero_stage={self.stages[attempt]}",
            *self.others[attempt],
        )


CHAINS = {
    "1-3-2": Chain((1, 3, 2)),
    "0-2-0": Chain((0, 2, 0)),
    "3-0-3": Chain((3, 0, 3)),
    "1-3-2 offloaded": Chain(
        (1, 3, 2), (OFFLOADED_OPTIMIZER, (*OFFLOADED_OPTIMIZER, *OFFLOADED_PARAMETERS), OFFLOADED_OPTIMIZER)
    ),
    "3-2-3 offloaded at times": Chain((3, 2, 3), (OFFLOADED_PARAMETERS, (), OFFLOADED_OPTIMIZER)),
    "2-1-1 offloaded at times": Chain((2, 1, 1), ((), OFFLOADED_OPTIMIZER, ())),
    "1-3-2 in bf16": Chain((1, 3, 2), mixed_precision="bf16"),
}


@pytest.fixture(scope="module")
def uninterrupted(base: Base) -> dict[str, Finished]:
    """By precision, on 1 worker at ZeRO stage 1."""
    common = (f"training.max_steps={STEPS}", "resources.num_workers=1", "deepspeed.zero_stage=1")
    return train_all(
        1,
        {
            precision: base.training(f"whole-{precision}", *common, *overrides)
            for precision, overrides in PRECISION.items()
        },
    )


@pytest.fixture(scope="module")
def chains(base: Base) -> dict[str, list[Finished]]:
    """The attempts of each chain, each in new processes, from what its last attempt has left in the run's folder."""
    attempts: list[dict[str, Finished]] = []
    for number, num_workers in enumerate(WORKERS):
        trainings: dict[str, Training] = {}
        for name, chain in CHAINS.items():
            overrides = chain.overrides(number)
            if number == 0:
                trainings[name] = base.training(f"chain-{name.replace(' ', '-')}", *overrides)
            else:
                trainings[name] = base.resumed(attempts[-1][name].training, *overrides)
        attempts.append(train_all(num_workers, trainings))
    return {name: [finished[name] for finished in attempts] for name in CHAINS}


def whole_curve(attempts: list[Finished], key: str) -> dict[int, float]:
    """Of all attempts together; fails where two report the same step."""
    points = [point for finished in attempts for point in finished.curve(key).items()]
    assert len({step for step, _ in points}) == len(points)
    return dict(points)


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_that_is_resized_at_each_resume_is_the_uninterrupted_one(
    uninterrupted: Mapping[str, Finished], chains: Mapping[str, list[Finished]], name: str
) -> None:
    """The tolerance of the losses is relative to them. In bf16 another order of a sum may round to another number,
    which is off by 2**-9 of its size."""
    chain, attempts = CHAINS[name], chains[name]
    whole = uninterrupted[chain.mixed_precision]
    loss_tolerance, weight_tolerance = (1e-6, 1e-6) if chain.mixed_precision == "no" else (1e-3, 1e-3)
    losses, expected = whole_curve(attempts, "train/loss"), whole.curve("train/loss")
    assert list(losses) == list(expected) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(expected, rel=loss_tolerance, abs=0)
    assert expected[1] - expected[STEPS] > 0.5, "something is learned"
    assert largest_difference(attempts[-1].weights(STEPS), whole.weights(STEPS)) < weight_tolerance
    for key in ("learning_rate", "epoch"):
        assert whole_curve(attempts, key) == whole.curve(key), key
    for finished, stage, num_workers, step in zip(attempts, chain.stages, WORKERS, LAST_STEPS, strict=True):
        manifest = manifest_at(finished, step)
        assert (manifest.zero_stage, manifest.world_size) == (stage, num_workers), "what was asked for has run"
        assert manifest.optimizer.adam_step == step
        assert manifest.progress.sample_position == step * GLOBAL_BATCH
    resized, straight = manifest_at(attempts[-1], STEPS).progress, manifest_at(whole, STEPS).progress
    assert resized.best_metric == pytest.approx(straight.best_metric, abs=1e-2), "a sum in another order"
    assert resized == straight.model_copy(update={"best_metric": resized.best_metric})


# --- the same size and stage -----------------------------------------------------------------------------------------

SETUPS = {
    "0": ("deepspeed.zero_stage=0",),
    "1": ("deepspeed.zero_stage=1",),
    "2": ("deepspeed.zero_stage=2",),
    "3": ("deepspeed.zero_stage=3",),
    "1 offloaded optimizer": ("deepspeed.zero_stage=1", *OFFLOADED_OPTIMIZER),
    "2 offloaded optimizer": ("deepspeed.zero_stage=2", *OFFLOADED_OPTIMIZER),
    "3 offloaded optimizer": ("deepspeed.zero_stage=3", *OFFLOADED_OPTIMIZER),
    "3 offloaded parameters": ("deepspeed.zero_stage=3", *OFFLOADED_PARAMETERS),
    "3 offloaded": ("deepspeed.zero_stage=3", *OFFLOADED_OPTIMIZER, *OFFLOADED_PARAMETERS),
}
SHORT, CUT = 8, 4
# Without clipping, because DeepSpeed adds up the gradient norm in another order where it offloads.
ON_THREE = (
    "resources.num_workers=3",
    f"training.max_steps={SHORT}",
    f"training.save_steps={CUT}",
    "training.max_grad_norm=0",
)


@pytest.fixture(scope="module")
def on_three(base: Base) -> dict[str, Finished]:
    """Uninterrupted on 3 workers."""
    trainings = {
        name: base.training(f"three-{name.replace(' ', '-')}", *ON_THREE, *setup) for name, setup in SETUPS.items()
    }
    return train_all(3, trainings)


OTHER_SETUP = {
    "1": "1 offloaded optimizer",
    "2": "2 offloaded optimizer",
    "3": "3 offloaded",
    "1 offloaded optimizer": "1",
    "2 offloaded optimizer": "2",
    "3 offloaded optimizer": "3",
    "3 offloaded parameters": "3",
    "3 offloaded": "3",
}
"""From which checkpoint on to where: the same stage, offloaded or not."""


@pytest.fixture(scope="module")
def resumed_on_three(base: Base, on_three: Mapping[str, Finished]) -> dict[str, Finished]:
    """From the checkpoint in the middle on, in new processes: as before, and offloaded or not where it was the other
    way round."""
    trainings = {}
    for name in SETUPS:
        checkpoint = on_three[name].training.saved_at(CUT)
        for target in (name, OTHER_SETUP.get(name)):
            if target is not None:
                key = f"{name} to {target}"
                trainings[key] = base.training(
                    f"resumed-{key.replace(' ', '-')}", *ON_THREE, *SETUPS[target], checkpoint=checkpoint
                )
    return train_all(3, trainings)


@pytest.mark.parametrize("name", SETUPS)
def test_the_same_size_and_stage_gives_the_same_bits(
    on_three: Mapping[str, Finished], resumed_on_three: Mapping[str, Finished], name: str
) -> None:
    whole, resumed = on_three[name], resumed_on_three[f"{name} to {name}"]
    assert resumed.state_files(SHORT) == whole.state_files(SHORT), "fp32 weights and both moments, every byte"
    assert len(whole.state_files(SHORT)) == 3
    assert resumed.curve("train/loss") == {s: v for s, v in whole.curve("train/loss").items() if s > CUT}


@pytest.mark.parametrize(("name", "target"), OTHER_SETUP.items())
def test_offloading_can_begin_and_end_at_a_resume(
    on_three: Mapping[str, Finished], resumed_on_three: Mapping[str, Finished], name: str, target: str
) -> None:
    """At stage 3 to the last bit. At stages 1 and 2 DeepSpeed adds up micro batches in another order if it offloads."""
    before, whole, resumed = on_three[name], on_three[target], resumed_on_three[f"{name} to {target}"]
    first = CUT + 1
    assert resumed.losses(first, first) == before.losses(first, first), "it begins with the very same weights"
    if "deepspeed.zero_stage=3" in SETUPS[target]:
        assert resumed.state_files(SHORT) == whole.state_files(SHORT), "as if it had always been that way"
    assert resumed.losses(first, SHORT) == pytest.approx(whole.losses(first, SHORT), rel=1e-6)
    assert largest_difference(resumed.weights(SHORT), whole.weights(SHORT)) < 1e-6


# --- submit and resume -----------------------------------------------------------------------------------------------


def test_resume_with_another_size_and_stage(tmp_path: Path) -> None:
    place = Place(tmp_path)
    common = (
        "training.global_train_batch_size=24",
        "training.per_device_train_batch_size=4",
        "training.logging_steps=1",
        "tracking.log_model=false",
    )
    attempts = (
        ("training.max_steps=6", "resources.num_workers=1", "deepspeed.zero_stage=1"),
        ("training.max_steps=9", "resources.num_workers=3", "deepspeed.zero_stage=3"),
        ("training.max_steps=12", "resources.num_workers=2", "deepspeed.zero_stage=2"),
    )
    whole = place.start("submit", "run.yaml", *common, *attempts[0], "training.max_steps=12")
    assert whole.wait() == ExitCode.SUCCEEDED, (whole.out, whole.err)
    first = place.start("submit", "run.yaml", *common, *attempts[0])
    assert first.wait() == ExitCode.SUCCEEDED, (first.out, first.err)
    for number, overrides in enumerate(attempts[1:], start=2):
        resumed = place.start("resume", first.run.run_id, *overrides)
        assert resumed.wait() == ExitCode.SUCCEEDED, (resumed.out, resumed.err)
        assert resumed.err == "", "MLflow has taken everything"
        tags = place.mlflow_run(first.run).data.tags
        found = tags["distlm.attempt"], tags["distlm.world_size"], tags["distlm.zero_stage"]
        assert found == (f"{number}", overrides[1][-1], overrides[2][-1])
    histories = []
    for run in (whole.run, first.run):
        mlflow_run = place.mlflow_run(run)
        assert mlflow_run.info.status == "FINISHED"
        assert not any(key.startswith(("resources.", "deepspeed.")) for key in mlflow_run.data.params)
        history = place.client.get_metric_history(mlflow_run.info.run_id, "train/loss")
        assert [point.step for point in history] == list(range(1, 13)), "one MLflow run, and each step in it once"
        histories.append([point.value for point in history])
    assert histories[1] == pytest.approx(histories[0], rel=1e-6)
    assert histories[0][0] - histories[0][-1] > 0.2, "something is learned"
