"""Fine-tuning with adapters: the same training at every ZeRO stage and on any number of workers, over a stop and a
resume, to an early end, and from one run to the next; and one run with real Ray."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_runs import make_tokenizer, reviews, sentences, write_conll, write_csv
from place import Place
from ranks import RankError, run_on_ranks
from safetensors.torch import load_file
from saved_state import saved_weights
from tiny_runs import CONFIG, Finished, Reports, Training, largest_difference, train_all
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from distlm.checkpoint.manifest import METHOD_STATE_NAME
from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import begin_attempt, create_run
from distlm.config.load import load_tree
from distlm.config.resolve import batch_plan, contradictions
from distlm.data.batches import StepOrder
from distlm.data.samples import SampleDataset
from distlm.errors import ExitCode
from distlm.run_folder import RunFolder, read_json
from distlm.worker.adapter import InitialTensors
from distlm.worker.prepare import prepare_run, sample_order

SEED, NUM_WORKERS = 7, 2
LORA = {"peft_type": "lora", "r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}
ADALORA = {"peft_type": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "lora_alpha": 16}
TEXT, WORDS = {"type": "text-classification"}, {"type": "token-classification"}


@dataclass(frozen=True)
class Data:
    """A pretrained model, and what it is fine-tuned on."""

    folder: Path
    model: Path
    tree: dict[str, Any]

    def training(self, name: str, *overrides: str, **sections: Any) -> Training:
        """A new run, prepared."""
        tree = {**copy.deepcopy(self.tree), "name": name, **sections}
        loaded = load_tree(tree, overrides, check=contradictions)
        run = RunFolder(self.folder / "runs" / name)
        create_run(loaded, run)
        begin_attempt(loaded, run, [])
        return Training(loaded.config, prepare_run(loaded.config, run), run)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("finetune")
    model = write_model(folder)
    joined = [sum_of(sentences(1 + number % 3, number)) for number in range(45)]
    files = {
        "train.csv": write_csv(folder / "train.csv", reviews(60, 0)),
        "dev.csv": write_csv(folder / "dev.csv", reviews(40, 1)),
        "train.conll": write_conll(folder / "train.conll", joined),
        "dev.conll": write_conll(folder / "dev.conll", joined[:7]),
    }
    tree: dict[str, Any] = {
        "seed": SEED,
        "task": WORDS,
        "model": {"name_or_path": str(model)},
        "peft": LORA,
        "data": {**sources(files["train.conll"], files["dev.conll"]), "max_seq_length": 32},
        "training": {
            **CONFIG["training"],
            "max_steps": 6,
            "global_train_batch_size": 8,
            "per_device_train_batch_size": 4,
            "eval_steps": 3,
            "save_steps": 3,
            "warmup_steps": 1,
        },
        "resources": {"num_workers": NUM_WORKERS, "device": "cpu"},
    }
    return Data(folder, model, tree)


def sum_of(rows: list[tuple[list[str], list[str]]]) -> tuple[list[str], list[str]]:
    """Sentences as one."""
    return [word for words, _ in rows for word in words], [tag for _, tags in rows for tag in tags]


def sources(train: Path, validation: Path) -> dict[str, Any]:
    return {
        name: [{"source": "files", "paths": [str(path)]}]
        for name, path in (("train", train), ("validation", validation))
    }


def write_model(folder: Path) -> Path:
    """A tiny BERT with its tokenizer; its weights are drawn so large that few steps teach an adapter something."""
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


# --- stages and workers ----------------------------------------------------------------------------------------------

BUDGET = 48  # tokens of a micro batch: two of the longest samples


@pytest.fixture(scope="module")
def parity(data: Data) -> dict[str, Finished]:
    """LoRA on 1 and 2 workers at stages 0, 2 and 3; and AdaLoRA straight, and from its half on."""
    finished: dict[str, Finished] = {}
    for workers in (1, NUM_WORKERS):
        trainings = {
            f"{workers}-{stage}": data.training(
                f"lora-{workers}-{stage}",
                f"resources.num_workers={workers}",
                f"deepspeed.zero_stage={stage}",
                f"training.per_device_train_batch_tokens={BUDGET}",
            )
            for stage in (0, 2, 3)
        }
        if workers == NUM_WORKERS:
            trainings |= adalora_trainings(data)
        finished |= train_all(workers, trainings)
    return finished


def test_batches_are_made_by_length_and_cut_by_tokens(data: Data, parity: dict[str, Finished]) -> None:
    """What the runs below are about: steps of samples of like length, some of more micro batches than others."""
    training = parity["2-0"].training
    dataset = SampleDataset([Path(path) for path in training.prepared.train_paths])
    order = sample_order(training.config, dataset.sizes)
    steps = StepOrder(order, batch_plan(training.config), dataset.lengths, True, BUDGET, SEED)
    numbers = {len(steps.step(step).micro_batches) for step in range(1, 7)}
    assert len(numbers) > 1 and all(number % NUM_WORKERS == 0 for number in numbers)


@pytest.mark.parametrize("name", ["1-2", "1-3", "2-0", "2-2", "2-3"])
def test_lora_trains_the_same_at_every_stage_on_any_number_of_workers(parity: dict[str, Finished], name: str) -> None:
    one, other = parity["1-0"], parity[name]
    assert other.losses(1, 6) == pytest.approx(one.losses(1, 6), abs=1e-5)
    assert len(set(one.losses(1, 6))) == 6
    for key in ("grad_norm", "eval/loss", "eval/f1", "eval/accuracy"):
        assert other.curve(key) == pytest.approx(one.curve(key), abs=1e-5), key
        assert one.curve(key)
    assert largest_difference(other.weights(6), one.weights(6)) < 1e-4
    assert all(".lora_" in name or ".classifier." in name for name in other.weights(6))


# --- AdaLoRA over a stop ---------------------------------------------------------------------------------------------

ADALORA_STEPS, ADALORA_CUT = 10, 5


def adalora_trainings(data: Data) -> dict[str, Training]:
    overrides = (f"training.max_steps={ADALORA_STEPS}", "training.save_steps=5", "deepspeed.zero_stage=3")
    straight = data.training("adalora", *overrides, peft=ADALORA)
    resumed = RunFolder.create(data.folder / "runs", "adalora-resumed")
    resumed.init.symlink_to(straight.run.init)
    return {
        "adalora": straight,
        "adalora-resumed": Training(straight.config, straight.prepared, resumed, straight.saved_at(ADALORA_CUT)),
    }


def test_adalora_goes_on_as_if_it_had_not_stopped(parity: dict[str, Finished]) -> None:
    straight, resumed = parity["adalora"], parity["adalora-resumed"]
    assert resumed.losses(ADALORA_CUT + 1, ADALORA_STEPS) == straight.losses(ADALORA_CUT + 1, ADALORA_STEPS)
    assert largest_difference(resumed.weights(ADALORA_STEPS), straight.weights(ADALORA_STEPS)) == 0
    states = [load_file(one.training.saved_at(ADALORA_STEPS).path / METHOD_STATE_NAME) for one in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    at_the_cut = load_file(straight.training.saved_at(ADALORA_CUT).path / METHOD_STATE_NAME)
    assert {name.split("/")[0] for name in at_the_cut} == {"exp_avg_ipt", "exp_avg_unc", "rank_pattern"}
    values = {name: weight for name, weight in straight.weights(ADALORA_STEPS).items() if ".lora_E." in name}
    assert sum(int(weight.count_nonzero()) for weight in values.values()) == 2 * len(values), "target_r of each"


# --- the early end ---------------------------------------------------------------------------------------------------

EARLY = (
    "training.max_steps=40",
    "training.eval_steps=1",
    "training.save_steps=50",
    "training.early_stopping_patience=3",
    "training.metric_for_best_model=accuracy",
    "training.learning_rate=2e-2",
)


@dataclass(frozen=True)
class Watched:
    """What rank 0 told of a training."""

    reports: Reports
    stopped: list[int]
    ended_early: list[int]

    @property
    def steps(self) -> list[int]:
        return [step for step, values in self.reports if "train/loss" in values]

    @property
    def evaluations(self) -> dict[int, float]:
        return {step: values["eval/accuracy"] for step, values in self.reports if "eval/accuracy" in values}


def train_watched(training: Training, stop_after: int) -> Watched:
    """Runs on every rank; asked to stop in step `stop_after` of this attempt."""
    from accelerate.state import AcceleratorState

    from distlm.worker.train import WorkerContext, train

    told, asked = Watched([], [], []), 0

    def is_stop_wanted() -> bool:
        nonlocal asked
        asked += 1  # once in a step
        return asked >= stop_after

    def report(step: int, values: dict[str, float]) -> None:
        told.reports.append((step, values))

    AcceleratorState._reset_state(reset_partial_state=True)
    context = WorkerContext(
        training.config, training.prepared, training.run, "cpu", training.checkpoint, report, print,
        is_stop_wanted=is_stop_wanted, stopped=told.stopped.append, ended_early=told.ended_early.append,
    )  # fmt: skip
    train(context)
    return told


def resumed(training: Training) -> Training:
    checkpoint, refused = CheckpointStore(training.run.checkpoints).latest_good()
    assert checkpoint is not None and not refused
    return Training(training.config, training.prepared, training.run, checkpoint)


def was_stopped(told: Watched) -> bool:
    """Rank 0 knows."""
    box = [bool(told.stopped)]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def train_in_parts(straight: Training, parted: Training) -> tuple[Watched, list[Watched], Watched]:
    """Straight; stopped after each other step, and gone on; and gone on after the early end."""
    whole = train_watched(straight, 10**6)
    parts = [train_watched(parted, 2)]
    while was_stopped(parts[-1]):
        parts.append(train_watched(resumed(parted), 2))
    return whole, parts, train_watched(resumed(straight), 10**6)


@pytest.fixture(scope="module")
def early(data: Data) -> tuple[Training, Training, Watched, list[Watched], Watched]:
    files = sources(data.folder / "train.csv", data.folder / "dev.csv")
    trainings = [
        data.training(name, *EARLY, task=TEXT, data={**files, "max_seq_length": 16}) for name in ("straight", "parted")
    ]
    whole, parts, after = run_on_ranks(train_in_parts, NUM_WORKERS, *trainings)[0]
    return trainings[0], trainings[1], whole, parts, after


Early = tuple[Training, Training, Watched, list[Watched], Watched]


def test_a_training_ends_where_it_gets_no_better(early: Early) -> None:
    training, _, whole, _, _ = early
    (last,) = whole.ended_early
    assert last < 40 and whole.steps == list(range(1, last + 1)) and whole.stopped == []
    best = max(whole.evaluations.values())
    first_best = next(step for step, value in whole.evaluations.items() if value == best)
    assert last == first_best + 3, "patience"
    store = CheckpointStore(training.run.checkpoints)
    kept = store.best("eval/accuracy", greater_is_better=True)
    assert kept is not None and store.manifest(kept).metrics["eval/accuracy"] == best
    assert first_best in {checkpoint.step for checkpoint in store.checkpoints()}
    manifest = store.manifest(store.checkpoints()[0])
    assert manifest.step == last
    assert (manifest.progress.best_metric, manifest.progress.num_evaluations_without_improvement) == (best, 3)


def test_a_resume_after_the_early_end_trains_nothing(early: Early) -> None:
    _, _, whole, _, after = early
    assert after.reports == [] and after.ended_early == whole.ended_early


def test_stops_and_resumes_change_nothing(early: Early) -> None:
    """Also not those in steps whose evaluation the stop leaves out: it is made up for."""
    straight, parted, whole, parts, _ = early
    assert len(parts) > 2
    assert [step for part in parts for step in part.steps] == whole.steps
    assert {step: value for part in parts for step, value in part.evaluations.items()} == whole.evaluations
    assert parts[-1].ended_early == whole.ended_early
    (last,) = whole.ended_early
    assert (
        largest_difference(saved_weights(straight.saved_at(last).path), saved_weights(parted.saved_at(last).path)) == 0
    )
    bests = [
        CheckpointStore(one.run.checkpoints).best("eval/accuracy", greater_is_better=True) for one in (straight, parted)
    ]
    assert bests[0] is not None and bests[1] is not None and bests[0].step == bests[1].step


# --- a save that goes wrong ------------------------------------------------------------------------------------------


def train_and_corrupt(training: Training) -> Any:
    """Runs on every rank; rank 1 writes other bytes than it holds, and their right hash."""
    from tiny_runs import train_once

    write_shard = CheckpointStore.write_shard

    def corrupt(store: CheckpointStore, *arguments: Any) -> Any:
        *others, content = arguments
        return write_shard(store, *others, zeroed(content))

    def zeroed(content: Any) -> Iterator[memoryview]:
        for number, piece in enumerate(content):
            yield memoryview(bytes(len(piece))) if number == 0 else piece

    if torch.distributed.get_rank() == 1:
        CheckpointStore.write_shard = corrupt  # type: ignore[method-assign]
    train_once(training, [])


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_an_adapter_that_was_saved_wrong_is_not_kept_and_ends_the_run(data: Data, asynchronous: str) -> None:
    training = data.training(f"corrupt-{asynchronous}", f"training.async_save={asynchronous}")
    with pytest.raises(RankError) as error:
        run_on_ranks(train_and_corrupt, NUM_WORKERS, training)
    text = str(error.value)
    assert "TrainingError: rank 0: TrainingError: the adapter that was saved is not that of the model" in text
    assert text.count("the adapter that was saved is not that of the model") >= 2, "on both ranks"
    assert "is all zero" in text or "has other values" in text
    assert CheckpointStore(training.run.checkpoints).checkpoints() == []
    assert CheckpointStore(training.run.checkpoints).unfinished() == []


# --- from run to run -------------------------------------------------------------------------------------------------


def test_pretrained_then_fine_tuned_then_fine_tuned_further(data: Data) -> None:
    texts = data.folder / "texts.txt"
    texts.write_text("\n\n".join(" ".join(sum_of(sentences(5, number))[0]) for number in range(40)))
    pretraining = data.training(
        "pretrained",
        task={"type": "masked-lm"}, peft=None,
        model={"config": {**CONFIG["model"]["config"], "max_position_embeddings": 64}},
        tokenizer={"name_or_path": str(data.model)}, data={**sources(texts, texts), "max_seq_length": 32},
    )  # fmt: skip
    base = train_all(NUM_WORKERS, {"p": pretraining})["p"].weights(6)

    first = data.training("first", "deepspeed.zero_stage=3", model={"name_or_path": "run:pretrained@last"})
    initial = load_file(first.run.init / "model" / "model.safetensors")
    of_encoder = {name for name in base if name.startswith("bert.")}
    assert len(of_encoder) > 30 and of_encoder == {name for name in initial if name.startswith("bert.")}
    assert all(torch.equal(base[name], initial[name]) for name in of_encoder)
    assert not torch.equal(base["bert.embeddings.word_embeddings.weight"], original(data))
    trained = train_all(NUM_WORKERS, {"f": first})["f"].weights(6)

    further = data.training(
        "further",
        "training.learning_rate=1e-3",
        model={"name_or_path": "run:pretrained"},
        peft={"adapter_name_or_path": "run:first@6"},
    )
    assert first.prepared.drawn_weights == ["classifier.bias", "classifier.weight"]
    assert further.prepared.drawn_weights == [], "the first run's adapter has brought the head"
    adapter = dict(InitialTensors(further.run.init / "adapter"))
    assert trained.keys() <= adapter.keys()
    for name, weight in trained.items():
        assert torch.equal(adapter[name], weight), f"{name} is not as the first run left it"
    finished = train_all(NUM_WORKERS, {"g": further})["g"]
    assert finished.weights(6).keys() == trained.keys()
    before = read_json(first.run.checkpoints / "step-00000006" / "manifest.json")["metrics"]["eval/loss"]
    assert finished.curve("eval/loss")[6] < before, "it goes on from there"

    merged = data.training("merged", model={"name_or_path": "run:first"}, peft={"peft_type": "full"})
    weights = load_file(merged.run.init / "model" / "model.safetensors")
    assert weights.keys() == initial.keys()
    changed = {name for name in weights if not torch.equal(weights[name], initial[name])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed and "classifier.weight" in changed
    assert "bert.embeddings.word_embeddings.weight" not in changed
    assert merged.prepared.drawn_weights == []


def original(data: Data) -> torch.Tensor:
    return load_file(data.model / "model.safetensors")["bert.embeddings.word_embeddings.weight"]


# --- with real Ray ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("ray") / "place"
    folder.mkdir()
    write_model(folder)
    files = [write_csv(folder / f"{name}.csv", reviews(n, s)) for name, n, s in (("train", 60, 0), ("dev", 40, 1))]
    training = {**CONFIG["training"], "global_train_batch_size": 8, "per_device_train_batch_size": 4, "warmup_steps": 1}
    config = {
        "name": "reviews",
        "task": TEXT,
        "model": {"name_or_path": "./model"},
        "peft": {**LORA, "r": 8},
        "data": {**sources(*files), "max_seq_length": 16},
        "training": {
            **training, "learning_rate": 1e-2, "max_steps": 60, "eval_steps": 5, "save_steps": 50,
            "metric_for_best_model": "accuracy", "early_stopping_patience": 3, "save_total_limit": 2,
        },
        "deepspeed": {"zero_stage": 3},
        "resources": {"num_workers": NUM_WORKERS, "device": "cpu"},
    }  # fmt: skip
    return Place(folder, config)


def test_a_run_of_lora_with_ray(place: Place) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    command = place.start("submit", "run.yaml")
    assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
    run = command.run
    assert "training ends after step" in command.out and "was no better in 3 evaluations" in command.out
    store = CheckpointStore(run.checkpoints)
    last, best = store.checkpoints()[0], store.best("eval/accuracy", greater_is_better=True)
    assert best is not None and last.step < 60

    # model/ is the adapter of the best step.
    saved, weights = load_file(run.model / "adapter_model.safetensors"), saved_weights(best.path)
    assert len(saved) == len(weights)
    assert sorted(float(t.double().sum()) for t in saved.values()) == sorted(
        float(t.double().sum()) for t in weights.values()
    )
    base = AutoModelForSequenceClassification.from_pretrained(place.folder / "model", num_labels=2, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    with open(place.folder / "dev.csv", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")).logits
    command = place.start("predict", run.run_id, "dev.csv", "--out", "p.jsonl", "--step", str(best.step))
    assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
    rows = [json.loads(line) for line in (place.folder / "p.jsonl").read_text().splitlines()]
    scores, ids = logits.softmax(-1).max(-1)
    assert [row["predicted_label"] for row in rows] == [["neg", "pos"][number] for number in ids.tolist()]
    np.testing.assert_allclose([row["score"] for row in rows], scores.numpy(), atol=1e-4)
    right = np.mean([row["label"] == row["predicted_label"] for row in rows])
    recorded = store.manifest(best).metrics["eval/accuracy"]
    assert right == recorded == 1.0

    # MLflow has metrics and tables.
    tracked = place.mlflow_run(run)
    assert tracked.info.status == "FINISHED"
    names = {"eval/loss", "eval/accuracy", "eval/f1", "eval/matthews_correlation", "train/loss"}
    assert names <= tracked.data.metrics.keys()
    assert tracked.data.params["peft.peft_type"] == "lora" and tracked.data.params["peft.r"] == "8"
    steps = [point.step for point in place.client.get_metric_history(tracked.info.run_id, "eval/accuracy")]
    assert steps == list(range(5, last.step + 1, 5))
    artifacts = {name for folder in artifact_folders(place, tracked.info.run_id) for name in folder}
    assert {"per_label.csv", "confusion_matrix.csv", "report.md"} <= artifacts

    # A resume of what is complete does nothing, and one with patience goes on.
    command = place.start("resume", run.run_id)
    assert command.wait() == ExitCode.SUCCEEDED and "nothing to do" in command.out
    further = f"training.max_steps={last.step + 2}"
    command = place.start("resume", run.run_id, further, "training.early_stopping_patience=50")
    assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
    assert f"continuing from checkpoint step-{last.step:08d}" in command.out
    assert CheckpointStore(run.checkpoints).checkpoints()[0].step == last.step + 2
    place.require_nothing_left(run)


def artifact_folders(place: Place, run_id: str, path: str | None = None) -> Iterator[list[str]]:
    """The names in every folder of artifacts."""
    found = place.client.list_artifacts(run_id, path)
    yield [Path(one.path).name for one in found if not one.is_dir]
    for one in found:
        if one.is_dir:
            yield from artifact_folders(place, run_id, one.path)
