"""The shipped recipes, each at a tiny size on two workers: what is particular to them is what is run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_runs import Finished, Training, english, train_all

from distlm.config.load import load_config
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.run_folder import RunFolder
from distlm.worker.prepare import prepare_run

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 6
SMALL = (
    "model.config.hidden_size=32", "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2",
    "model.config.intermediate_size=48", "data.max_seq_length=32", "tokenizer={train: {vocab_size: 500}}",
    f"training.max_steps={STEPS}", "training.global_train_batch_size=8", "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=4", "training.learning_rate=5.0e-3", "training.mixed_precision=no",
    "training.logging_steps=1", "training.eval_steps=null", "training.save_steps=null", "resources.num_workers=2",
    "resources.device=cpu",
)  # fmt: skip
POEMS = [f"白日依山{a}，黃河入海{b}。欲窮千里目，更上一層樓。" for a in "盡東西南北" for b in "流川江水月"]


def corpus(folder: Path, name: str, documents: Sequence[str]) -> str:
    """A local data set in the place of the recipe's; the override of a source that reads it."""
    path = folder / f"{name}.jsonl"
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    path.write_text("\n".join(lines), encoding="utf-8")
    return json.dumps({"source": "datasets", "path": "json", "data_files": [str(path)]})


def recipe(folder: Path, name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", [*SMALL, *overrides], check=contradictions).config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    folder = tmp_path_factory.mktemp("recipes")
    texts = [english(1, seed) for seed in range(60)]
    first, second = corpus(folder, "first", texts[:40]), corpus(folder, "second", texts[40:])
    weighted = [json.dumps({**json.loads(source), "weight": w}) for source, w in ((first, 0.85), (second, 0.15))]
    chinese = corpus(folder, "chinese", [*POEMS, *texts[:5]])
    validation = f"data.validation=[{second}]"
    configs = {
        "bert-base": recipe(folder, "pretrain-bert-base", f"data.train=[{first}]", validation),
        "modernbert-base": recipe(
            folder, "pretrain-modernbert-base", f"data.train=[{', '.join(weighted)}]", validation,
            "training.lr_scheduler_kwargs.num_decay_steps=2", "training.warmup_steps=2",
            "model.config.local_attention=8", "model.config.layer_types=[full_attention, sliding_attention]",
        ),
        "chinese": recipe(folder, "pretrain-chinese", f"data.train=[{chinese}]", "data.validation_fraction=0.1"),
    }  # fmt: skip
    trainings = {}
    for name, config in configs.items():
        run = RunFolder.create(folder / "runs", name)
        trainings[name] = Training(config, prepare_run(config, run), run)
    return train_all(2, trainings)


@pytest.mark.parametrize("name", ["bert-base", "modernbert-base", "chinese"])
def test_each_learns(finished: dict[str, Finished], name: str) -> None:
    losses = finished[name].losses(1, STEPS)
    prepared = finished[name].training.prepared
    assert losses[0] == pytest.approx(math.log(prepared.vocab_size), abs=0.3)
    assert losses[-1] < losses[0] - 0.1
    assert finished[name].curve("eval/loss")[STEPS] < losses[0]
    assert prepared.masked_only_head


def test_what_is_particular_to_each_is_trained(finished: dict[str, Finished]) -> None:
    modern, chinese = finished["modernbert-base"], finished["chinese"]
    rates = modern.curve("learning_rate")
    assert [rates[step] for step in range(1, STEPS + 1)] == pytest.approx([0, 2.5e-3, 5e-3, 5e-3, 5e-3, 2.5e-3])
    shares = [source["share"] for source in modern.training.prepared.train_mixture]
    assert shares == pytest.approx([0.85, 0.15], abs=0.02)
    assert modern.training.prepared.data_info["sources"]["train"][0]["num_documents"] == 40
    assert chinese.training.config.task.whole_word_masking
    assert chinese.training.prepared.data_info["train"]["num_documents"] > 20
    assert finished["bert-base"].curve("learning_rate")[STEPS] > 1e-5
