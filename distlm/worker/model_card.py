"""README.md of an exported model: what it is and how it came about, from the records of its run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from distlm import __version__
from distlm.checkpoint.manifest import Manifest
from distlm.config.attempt import Attempt, accepted_attempts
from distlm.config.resolve import NOT_SEMANTICS, semantic_params
from distlm.errors import InputError
from distlm.redact import redact_uri
from distlm.run_folder import RunFolder, read_json, read_yaml

_SNIPPET = """\
```python
from transformers import pipeline

fill_mask = pipeline("fill-mask", model=".")  # the folder of this file
print(fill_mask(f"This is a {fill_mask.tokenizer.mask_token}."))
```"""
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_METRICS = {"eval/loss": "loss", "eval/perplexity": "perplexity", "eval/accuracy": "accuracy"}


def model_card(run: RunFolder, manifest: Manifest) -> str:
    """The text, for a checkpoint with that manifest.

    Values are those of run.yaml, where `${VAR}` stands as the user wrote it. Raises InputError if the run's files are
    damaged.
    """
    try:
        tree, prepared = read_yaml(run.run_yaml), read_json(run.init / "prepared.json")
        model_type = read_json(run.init / "model" / "config.json")["model_type"]
        name = _line(tree["name"])
        metadata = _metadata(name, tree, prepared, model_type, manifest)
        sections = (
            f"---\n{metadata.to_yaml()}\n---",
            f"# {name}",
            _what_it_is(run, tree, prepared, model_type, manifest),
            f"## Use\n\n{_SNIPPET}",
            f"## Data\n\n{_data(tree, prepared)}",
            f"## Training\n\n{_training(run, tree, manifest)}",
            f"## Evaluation\n\n{_evaluation(tree, prepared, manifest)}",
            f"## Versions\n\n{_versions(manifest)}",
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{run.run_yaml} or a file in {run.init} is damaged: {type(error).__name__}: {error}"
        ) from error
    return "\n\n".join(sections) + "\n"


def _metadata(
    name: str, tree: Mapping[str, Any], prepared: Mapping[str, Any], model_type: str, manifest: Manifest
) -> ModelCardData:
    results = [
        EvalResult(
            task_type="fill-mask",
            dataset_type="text",
            dataset_name="held-out text",
            dataset_split="validation",
            metric_type=_METRICS[key],
            metric_value=value,
        )
        for key, value in manifest.metrics.items()
        if key in _METRICS
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        base_model=_repository(tree["model"]["name_or_path"]) if prepared.get("is_from_hub") else None,
        tags=["distlm", "masked-lm", model_type],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _repository(name_or_path: str | None) -> str | None:
    """A name that the Hub can have; None for others, such as an unexpanded ${VAR}."""
    return name_or_path if name_or_path and _REPOSITORY.fullmatch(name_or_path) else None


def _what_it_is(
    run: RunFolder, tree: Mapping[str, Any], prepared: Mapping[str, Any], model_type: str, manifest: Manifest
) -> str:
    num_parameters = sum(parameter.numel for parameter in manifest.parameters)
    origin = tree["model"]["name_or_path"]
    start = f"starting from the weights of {_code(origin)}" if origin else "from scratch"
    position = manifest.progress.sample_position
    return (
        f"A {model_type} encoder with {num_parameters:,} trained parameters (fp32), trained by distlm with masked "
        f"language modelling, {start}.\n\n"
        "| | |\n|---|---|\n"
        f"| run | {_code(run.run_id)} |\n"
        f"| step | {manifest.step:,} |\n"
        f"| samples seen | {position:,} of {prepared['data_info']['max_seq_length']:,} tokens each |\n"
        f"| epochs | {position / prepared['num_train_samples']:.4g} |"
    )


def _data(tree: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
    info = prepared["data_info"]
    lines = ["| split | documents | tokens | samples |", "|---|---|---|---|"]
    for split in ("train", "validation"):
        if counts := info[split]:
            numbers = (counts["num_documents"], counts["num_tokens"], counts["num_blocks"])
            lines.append(f"| {split} | {' | '.join(f'{number:,}' for number in numbers)} |")
    lines.append("")
    for split in ("train", "validation"):
        lines += [f"- {split}: {_source(source)}" for source in tree["data"][split]]
    if info["validation"] and not tree["data"]["validation"]:
        lines.append(
            f"- validation: a share of {tree['data']['validation_fraction']} of the training documents, held out"
        )
    lines += ["", f"The tokenizer has {info['vocab_size']:,} tokens; {_tokenizer(tree)}."]
    return "\n".join(lines)


def _source(source: Mapping[str, Any]) -> str:
    settings = (f"{key}: {_code(value)}" for key, value in source.items() if key != "source" and value is not None)
    return ", ".join((_code(source["source"]), *settings))


def _tokenizer(tree: Mapping[str, Any]) -> str:
    if name := tree["tokenizer"]["name_or_path"]:
        return f"it is that of {_code(name)}"
    if tree["tokenizer"]["train"]:
        return "it was trained on the training text"
    return f"it is that of {_code(tree['model']['name_or_path'])}"


def _training(run: RunFolder, tree: Mapping[str, Any], manifest: Manifest) -> str:
    def is_shown(key: str) -> bool:
        return not key.startswith(("data.train", "data.validation", "name"))

    rows = [
        f"| {key} | {_code(value)} |" for key, value in semantic_params(dict(tree)).items() if is_shown(key) and value
    ]
    precision = "fp32" if manifest.mixed_precision == "no" else manifest.mixed_precision
    workers = "1 worker" if manifest.world_size == 1 else f"{manifest.world_size} workers"
    lines = [
        f"This checkpoint was written by {workers} at ZeRO stage {manifest.zero_stage}, {_line(precision)}. The config "
        "that the run was submitted with:",
        "",
        "| key | value |",
        "|---|---|",
        *rows,
    ]
    if changes := list(_changes(run)):
        lines += ["", "Changed when the run was resumed:", "", *changes]
    return "\n".join(lines)


def _changes(run: RunFolder) -> Iterator[str]:
    for folder in accepted_attempts(run):
        attempt = Attempt.read(folder)
        overrides = [item for item in attempt.overrides if not item.startswith(NOT_SEMANTICS)]
        if attempt.changes and overrides:  # those of the first attempt are in run.yaml
            yield f"- attempt {folder.number}: {', '.join(map(_code, overrides))}"


def _evaluation(tree: Mapping[str, Any], prepared: Mapping[str, Any], manifest: Manifest) -> str:
    rows = [f"| {label} | {manifest.metrics[key]:.6g} |" for key, label in _METRICS.items() if key in manifest.metrics]
    if not rows:
        return f"Step {manifest.step:,} was not evaluated."
    share = tree["task"]["eval_mlm_probability"]
    return "\n".join(
        [
            f"At step {manifest.step:,}, on {prepared['num_validation_samples']:,} held-out samples (or on "
            f"`training.max_eval_samples` of them), with a share of {share} of the tokens hidden:",
            "",
            "| metric | value |",
            "|---|---|",
            *rows,
        ]
    )


def _versions(manifest: Manifest) -> str:
    written = ", ".join(f"{_line(package)} {_line(version)}" for package, version in manifest.versions.items())
    return f"Written with {written}; exported by distlm {__version__}."


def _line(text: object) -> str:
    """Text in one line, without passwords."""
    return redact_uri(" ".join(str(text).split()))


def _code(value: object) -> str:
    """A value in a cell of a Markdown table."""
    text = _line(value).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
