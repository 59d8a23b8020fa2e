"""Runs of tiny BERTs that have learned to label, in the process of the test: what `distlm predict` is tried on."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_runs import CONFIG, Finished, Training, train_all
from transformers import BertTokenizerFast

from distlm.config.attempt import begin_attempt, create_run
from distlm.config.load import load_tree
from distlm.config.resolve import contradictions
from distlm.run_folder import RunFolder
from distlm.worker.prepare import prepare_run

GOOD, BAD, PLACES, PEOPLE = ["great", "lovely"], ["awful", "dull"], ["Rome", "Oslo"], ["Ann", "Bo"]
WORDS = ["the", "film", "was", "and", "long", "short", "in", "met", ".", *GOOD, *BAD, *PLACES, *PEOPLE]


@dataclass(frozen=True)
class LabelledRun:
    """A trained run, and the files that it was trained and evaluated on."""

    run: RunFolder
    validation: Path
    finished: Finished


def make_tokenizer(folder: Path) -> Path:
    vocabulary = folder / "vocab.txt"
    letters = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str.lower, WORDS), *letters]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def reviews(num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Texts with a label, several labels and a number; ids come twice."""
    pick = random.Random(seed)
    rows = []
    for number in range(num_rows):
        is_good, is_long = pick.random() < 0.5, pick.random() < 0.5
        text = f"The film was {pick.choice(GOOD if is_good else BAD)} and {'long' if is_long else 'short'}."
        labels = ["good"] * is_good + ["long"] * is_long
        rows.append(
            {"id": number // 2, "text": text, "label": "pos" if is_good else "neg", "labels": labels,
             "stars": float(is_good) + 0.5 * is_long, "other": text if is_long else "short."}
        )  # fmt: skip
    return rows


def sentences(num_rows: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Words and their tags."""
    pick = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        person, place = pick.choice(PEOPLE), pick.choice(PLACES)
        rows.append(([person, "met", "the", "film", "in", place, "."], ["B-PER", "O", "O", "O", "O", "B-LOC", "O"]))
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = ["id", "text", "label", "stars"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_conll(path: Path, rows: list[tuple[list[str], list[str]]]) -> Path:
    text = "".join("".join(f"{word} X {tag}\n" for word, tag in zip(*row, strict=True)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def make_runs(folder: Path) -> dict[str, LabelledRun]:
    """One of each kind: single, pair, multi, regression, words. They share two processes' start."""
    tokenizer = make_tokenizer(folder)
    text = {"type": "text-classification"}
    csv_files = [write_csv(folder / f"{name}.csv", reviews(n, s)) for name, n, s in (("train", 60, 0), ("dev", 40, 1))]
    json_files = [
        write_jsonl(folder / f"{name}.jsonl", reviews(n, s)) for name, n, s in (("train", 60, 0), ("dev", 40, 1))
    ]
    word_files = [
        write_conll(folder / f"{name}.conll", sentences(n, s)) for name, n, s in (("train", 60, 0), ("dev", 40, 1))
    ]
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any], list[Path]]] = {
        "single": (text, {}, csv_files),
        "pair": (text, {"text_pair_column": "other"}, json_files),
        "multi": ({**text, "problem_type": "multi_label_classification"}, {"label_column": "labels"}, json_files),
        "regression": ({**text, "problem_type": "regression"}, {"label_column": "stars"}, csv_files),
        "words": ({"type": "token-classification"}, {}, word_files),
    }
    trainings = {}
    for name, (task, columns, (train, validation)) in kinds.items():
        tree = {
            **CONFIG,
            "name": name,
            "task": task,
            "tokenizer": {"name_or_path": str(tokenizer)},
            "data": {
                "train": [{"source": "files", "paths": [str(train)], **columns}],
                "validation": [{"source": "files", "paths": [str(validation)], **columns}],
                "max_seq_length": 16,
            },
            "training": {**CONFIG["training"], "metric_for_best_model": "loss", "mixed_precision": "bf16"},
            "resources": {"num_workers": 1, "device": "cpu"},
        }
        loaded = load_tree(tree, check=contradictions)
        run = RunFolder(folder / "runs" / name)
        create_run(loaded, run)
        begin_attempt(loaded, run, [])
        trainings[name] = Training(loaded.config, prepare_run(loaded.config, run), run)
    finished = train_all(1, trainings)
    return {
        name: LabelledRun(training.run, Path(training.config.data.validation[0].paths[0]), finished[name])
        for name, training in trainings.items()
    }
