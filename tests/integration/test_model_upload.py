"""What MLflow gets of every task: a pipeline that loads and predicts elsewhere, also of an adapter with its base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import mlflow.transformers
import peft
import pytest
import torch
import transformers
from mlflow import MlflowClient

from distlm.run_folder import RunFolder, write_json, write_yaml
from distlm.tracking.mlflow import MlflowTracker
from distlm.tracking.model_upload import upload_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "an", "example", "with", "a", ".", "cat", "sat", "text", "lives"]
TASKS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "single": ({"type": "text-classification", "problem_type": "single_label_classification"},
               "SequenceClassification", ["bad", "good", "so-so"]),
    "multi": ({"type": "text-classification", "problem_type": "multi_label_classification"},
              "SequenceClassification", ["bad", "good", "so-so"]),
    "regression": ({"type": "text-classification", "problem_type": "regression"}, "SequenceClassification", []),
    "words": ({"type": "token-classification"}, "TokenClassification", ["B-PER", "I-PER", "O"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tracker(runs_dir: Path, request: pytest.FixtureRequest) -> MlflowTracker:
    return MlflowTracker.connect(request.node.name, "name", "tests", runs_dir, start_time_ms=1000)


def trained(folder: Path, name: str, pair: str | None = None, peft_type: str | None = None) -> RunFolder:
    """A run whose training of a tiny BERT has ended."""
    task, kind, labels = TASKS[name]
    torch.manual_seed(0)
    run = RunFolder.create(folder, "run")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        problem_type=task.get("problem_type"),
        initializer_range=0.5,
        **({"id2label": dict(enumerate(labels))} if labels else {"num_labels": 1}),
    )
    model = getattr(transformers, f"BertFor{kind}")(config)
    run.init.mkdir()
    model.save_pretrained(run.init / "model")
    if peft_type is None:
        shutil.copytree(run.init / "model", run.model)
    else:
        lora = peft.LoraConfig(task_type=peft_type, r=2, init_lora_weights=False, modules_to_save=["classifier"])
        peft.get_peft_model(model, lora).save_pretrained(str(run.model))
    tokenizer.save_pretrained(run.model)
    write_yaml(run.run_yaml, {"task": task, "data": {"max_seq_length": 16, "train": [{"text_pair_column": pair}]}})
    write_json(run.init / "prepared.json", {"tag_scheme": "iob2", "labels": labels, "num_labels": len(labels) or 1})
    return run


def upload(run: RunFolder, tracker: MlflowTracker, *, with_base: bool = True) -> str:
    """The model's URI."""
    mlflow.set_tracking_uri(tracker.tracking_uri)
    return upload_model(run, tracker.mlflow_run_id, with_base=with_base)


@pytest.mark.parametrize(("name", "pair"), [("single", None), ("single", "other"), ("multi", None),
                                            ("regression", None), ("words", None)])  # fmt: skip
def test_a_model_of_every_task_predicts(name: str, pair: str | None, tracker: MlflowTracker, tmp_path: Path) -> None:
    run = trained(tmp_path, name, pair)
    uri = upload(run, tracker)
    shutil.rmtree(run.path)
    pipeline = mlflow.transformers.load_model(uri)
    loaded = mlflow.pyfunc.load_model(uri)
    assert loaded.metadata.signature.outputs
    assert loaded.metadata.signature.inputs.input_names() == (["text", "text_pair"] if pair else [0])
    text: Any = "a cat sat with an example" if pair is None else {"text": "a cat sat", "text_pair": "an example"}
    if name == "words":
        groups = [found["entity_group"] for found in pipeline(text, aggregation_strategy="first", ignore_labels=[])]
        assert groups and loaded.predict([text]) == [",".join(groups)]
        return
    found = loaded.predict([text])
    if name == "multi":
        scores = {cell["label"]: cell["score"] for cell in found.iloc[0]}
        assert scores == {one["label"]: pytest.approx(one["score"]) for one in pipeline(text, top_k=None)}
        assert set(scores) == {"bad", "good", "so-so"} and sum(scores.values()) != pytest.approx(1)
        return
    best = pipeline(text) if pair else pipeline(text)[0]
    assert found["score"][0] == pytest.approx(best["score"]) and found["label"][0] == best["label"]
    if name == "regression":
        with torch.no_grad():
            logits = pipeline.model(**pipeline.tokenizer(text, return_tensors="pt")).logits
        assert best["score"] == pytest.approx(float(logits)), "the number itself, not a probability of it"


@pytest.mark.parametrize(("name", "peft_type"), [("single", "SEQ_CLS"), ("words", "TOKEN_CLS")])
def test_an_adapter_carries_its_base(name: str, peft_type: str, tracker: MlflowTracker, tmp_path: Path) -> None:
    run = trained(tmp_path, name, peft_type=peft_type)
    auto_class = getattr(transformers, f"AutoModelFor{TASKS[name][1]}")
    expected = peft.PeftModel.from_pretrained(auto_class.from_pretrained(run.init / "model"), run.model).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(run.model)("a cat sat", return_tensors="pt")
    uri = upload(run, tracker)
    base = auto_class.from_pretrained(run.init / "model")
    shutil.rmtree(run.path)

    pipeline = mlflow.transformers.load_model(uri)
    adapter = mlflow.artifacts.download_artifacts(run_id=tracker.mlflow_run_id, artifact_path="adapter")
    from_files = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits = expected(**inputs).logits
        assert torch.equal(pipeline.model(**inputs).logits, logits)
        assert torch.equal(from_files(**inputs).logits, logits)
    assert isinstance(pipeline.model, peft.PeftModel)
    loaded = mlflow.pyfunc.load_model(uri)
    assert len(loaded.predict(["a cat sat"])) == 1
    assert "peft==" in Path(mlflow.artifacts.download_artifacts(uri), "requirements.txt").read_text()


def test_an_adapter_without_its_base(tracker: MlflowTracker, tmp_path: Path) -> None:
    run = trained(tmp_path, "single", peft_type="SEQ_CLS")
    uri = upload(run, tracker, with_base=False)
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    assert not (folder / "model").exists() and (folder / "peft" / "adapter_model.safetensors").exists()
    assert mlflow.transformers.load_model(uri)("a cat sat")[0]["label"] in TASKS["single"][2]
    artifacts = MlflowClient(tracker.tracking_uri).list_artifacts(tracker.mlflow_run_id, "adapter")
    assert "adapter/adapter_config.json" in [artifact.path for artifact in artifacts]
