"""Cards of models that label: what they say is so, and their snippets run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
from huggingface_hub import ModelCard
from labelled_runs import LabelledRun
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from distlm.config.metrics import METRICS
from distlm.run_folder import read_json, read_yaml
from distlm.worker.export import choose_checkpoint, export_checkpoint
from distlm.worker.model_card import snippet

KINDS = {
    "single": "single_label_classification",
    "pair": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
    "words": "token-classification",
}
OUTPUTS = {"single": "'score'", "pair": "'score'", "multi": "'long'", "regression": ".", "words": "["}


def run_snippet(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found
    capsys.readouterr()
    exec(found[1], {})
    return capsys.readouterr().out


@pytest.mark.parametrize("name", KINDS)
def test_the_card_of_every_kind(
    name: str,
    labelled_runs: dict[str, LabelledRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = labelled_runs[name]
    export_checkpoint(trained.run, *choose_checkpoint(trained.run, "12"), tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    card = ModelCard.load(tmp_path / "m" / "README.md")
    task = "token-classification" if name == "words" else "text-classification"
    assert card.data.to_dict().items() >= {"library_name": "transformers", "pipeline_tag": task}.items()
    reported = {key: value for step, values in trained.finished.reports if step == 12 for key, value in values.items()}
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: reported[f"eval/{name}"] for name in METRICS[KINDS[name]] if f"eval/{name}" in reported}
    labels = {"words": "B-PER", "multi": "good", "regression": None}.get(name, "pos")
    rows = re.findall(r"^\| (\d+) \| `(.+)` \| (\d+) \|$", text, re.MULTILINE)
    assert ("## Labels" in text) == bool(labels) == bool(rows)
    assert labels is None or labels in [label for _, label, _ in rows]
    monkeypatch.chdir(tmp_path / "m")
    assert OUTPUTS[name] in run_snippet(text, capsys)


@pytest.mark.parametrize(("name", "peft_type"), [("multi", "SEQ_CLS"), ("words", "TOKEN_CLS")])
def test_the_snippet_of_an_adapter(
    name: str,
    peft_type: str,
    labelled_runs: dict[str, LabelledRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = labelled_runs[name].run
    auto_class: Any = AutoModelForTokenClassification if name == "words" else AutoModelForSequenceClassification
    config = peft.LoraConfig(task_type=peft_type, r=2, modules_to_save=["classifier"])
    peft.get_peft_model(auto_class.from_pretrained(run.init / "model"), config).save_pretrained(str(tmp_path))
    for file in (run.init / "tokenizer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tree = read_yaml(run.run_yaml)
    tree["model"]["name_or_path"] = str(run.init / "model")
    tree["peft"] = {"peft_type": "lora", "r": 2}
    text = snippet(tree, read_json(run.init / "prepared.json"))
    assert 'PeftModel.from_pretrained(base, ".")' in text
    monkeypatch.chdir(tmp_path)
    assert OUTPUTS[name] in run_snippet(text, capsys)
