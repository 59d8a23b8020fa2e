"""Tokens per second of distlm against the Hugging Face Trainer: same model, data, batch, precision, threads, optimizer.

    python benchmarks/throughput.py [--shape small|base] [--precision bf16 no] [--dropout 0.1 0] [--repeat 3]
    python benchmarks/throughput.py --model-type modernbert --hidden-size 384 --num-hidden-layers 6 ...

Both train on CPU workers of this machine under torchrun: the Trainer with DistributedDataParallel and
DataCollatorForLanguageModeling, distlm with its own worker loop (without Ray, which benchmarks/step_time.py adds). Both
start from the same weights and read the same packed samples. Time is the wall clock of rank 0 from the end of the last
warm-up step to the end of the last step, so that starting, compiling and saving are not in it. The ways are
interleaved, so that a busy moment of the machine hits all of them. Prints medians with the smallest and the largest,
and the mean loss since the warm-up of both, which shows that they train the same (other masks, other dropout, other
order of the samples). Goals in bf16: 3x for small, 1.35x for base.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import (
    SHAPES,
    machine,
    median_and_spread,
    model_config,
    prepare,
    table,
    text_source,
    torchrun,
    write_config,
)
from hf_trainer import MAX_GRAD_NORM, WEIGHT_DECAY, Measured, train_and_time

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6}
LEARNING_RATE, MLM_PROBABILITY = 1e-4, 0.15
VOCAB_SIZE = 30_522


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    shape = SHAPES[options.shape] | {
        key: value for key, value in vars(options).items() if key in SHAPES["small"] and value
    }
    num_tokens = options.steps * options.batch * options.num_workers * options.sequence
    rows = []
    for precision in options.precision:
        for dropout in options.dropout:
            config = write_config(folder / "run.yaml", tree(options, folder, shape, precision, dropout))
            measured: dict[str, list[Measured]] = {"Trainer": [], "distlm": []}
            for repeat in range(options.repeat):
                run = prepare(config, f"{precision}-{dropout}-{repeat}")
                for name, train in (("Trainer", train_with_trainer), ("distlm", train_with_distlm)):
                    measured[name].append(train(options, run, folder / "result.json"))
                    print(f"{precision} dropout {dropout} {name}: {measured[name][-1]}", file=sys.stderr)
            rows.append(row(f"{precision}, dropout {dropout:g}", num_tokens, measured))
    print(
        f"{options.model_type}, {shape['num_hidden_layers']} layers x {shape['hidden_size']}, vocabulary "
        f"{VOCAB_SIZE:,}; {options.num_workers} workers with {options.threads} thread(s) each, {options.batch} samples "
        f"of {options.sequence} tokens per worker and step; {options.steps} steps after {options.warmup_steps}, "
        f"medians of {options.repeat} (smallest-largest). {machine()}\n"
    )
    columns = [f"{name} {what}" for what in ("tokens/s", "peak GiB", "loss") for name in ("Trainer", "distlm")]
    print(table(["", *columns[:2], "ratio", *columns[2:]], rows))


def row(name: str, num_tokens: int, measured: Mapping[str, list[Measured]]) -> list[str]:
    """Speed with its spread, the ratio of each repetition, peak memory of rank 0, and the loss."""
    trainer, distlm = measured["Trainer"], measured["distlm"]
    ratios = [theirs.seconds / ours.seconds for theirs, ours in zip(trainer, distlm, strict=True)]
    return [
        name,
        *(median_and_spread([num_tokens / one.seconds for one in way], 0) for way in (trainer, distlm)),
        f"**{median_and_spread(ratios)}**",
        *(f"{statistics.median(one.peak_gib for one in way):.2f}" for way in (trainer, distlm)),
        *(f"{statistics.median(one.loss for one in way):.3f}" for way in (trainer, distlm)),
    ]


def tree(
    options: argparse.Namespace, folder: Path, shape: Mapping[str, Any], precision: str, dropout: float
) -> dict[str, Any]:
    """The config of distlm; the Trainer's arguments are taken from the same values."""
    config: dict[str, Any] = {
        "runs_dir": str(folder / "runs"),
        "task": {"type": "masked-lm", "mlm_probability": MLM_PROBABILITY},
        "model": {"config": model_config(options.model_type, shape, dropout, vocab_size=VOCAB_SIZE)},
        "tokenizer": {"train": {"vocab_size": 8192, "max_documents": 200}},
        "data": {
            "train": [{**text_source(), "max_documents": 400}],
            "validation_fraction": 0.0,
            "max_seq_length": options.sequence,
        },
        "training": {
            "max_steps": options.warmup_steps + options.steps,
            "global_train_batch_size": options.batch * options.num_workers,
            "per_device_train_batch_size": options.batch,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MAX_GRAD_NORM,
            **ADAM,
            "mixed_precision": precision,
            "logging_steps": options.warmup_steps,
            "eval_steps": None,
            "save_steps": None,
        },
        "resources": {"num_workers": options.num_workers, "device": "cpu"},
    }
    if options.zero_stage is not None:
        config["deepspeed"] = {"zero_stage": options.zero_stage}
    return config


def train_with_distlm(options: argparse.Namespace, run: Path, result: Path) -> Measured:
    bound = ["--bound"] * options.bound
    torchrun(options.num_workers, options.threads, Path(__file__).with_name("common.py"), run, result, *bound)
    reports = [r for r in json.loads(result.read_text())["reports"] if "train/loss" in r["values"]]
    after = [r for r in reports if r["step"] > options.warmup_steps]
    begin = next(r for r in reports if r["step"] == options.warmup_steps)
    loss = statistics.mean(r["values"]["train/loss"] for r in after)
    return Measured(after[-1]["at_s"] - begin["at_s"], loss, after[-1]["peak_gib"])


def train_with_trainer(options: argparse.Namespace, run: Path, result: Path) -> Measured:
    torchrun(options.num_workers, options.threads, __file__, "--as-trainer", run, result)
    return Measured(**json.loads(result.read_text()))


# --- the Trainer, under torchrun --------------------------------------------------------------------------------------


def trainer_main(run_folder: Path, result: Path) -> None:
    """One process of the Trainer on the prepared run."""
    import numpy as np
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

    from distlm.config.attempt import load_attempt
    from distlm.data.pack import PackedDataset
    from distlm.run_folder import RunFolder, read_json

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run = RunFolder(run_folder)
    training = load_attempt(run, run.attempts()[-1]).config.training
    packed = PackedDataset([Path(path) for path in read_json(run.init / "prepared.json")["train_paths"]])

    class Samples(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(packed)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": packed[np.array([index])][0].tolist()}

    tokenizer = AutoTokenizer.from_pretrained(run.init / "tokenizer")
    train_and_time(
        AutoModelForMaskedLM.from_pretrained(run.init / "model", dtype=torch.float32),
        Samples(),
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY),
        result,
        warmup_steps=training.logging_steps,
        precision=training.mixed_precision,
        per_device_train_batch_size=training.per_device_train_batch_size,
        max_steps=training.max_steps or 0,
        learning_rate=LEARNING_RATE,
        **ADAM,
    )


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--model-type", default="bert", help="any that has a masked-LM class in transformers")
    for key in SHAPES["small"]:
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, help="instead of the shape's")
    parser.add_argument("--precision", choices=["bf16", "no"], nargs="+", default=["bf16", "no"])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.1, 0.0])
    parser.add_argument("--sequence", type=int, default=128, help="tokens in a sample")
    parser.add_argument("--batch", type=int, default=8, help="samples per worker and step")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--bound", action="store_true", help="bind each worker of distlm to its own cores")
    parser.add_argument("--zero-stage", type=int, help="of distlm; default: distlm's")
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="that are timed; a multiple of the warm-up's")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to prepare and train; default: a temporary folder")
    options = parser.parse_args(arguments or None)
    if options.steps % options.warmup_steps:
        parser.error("--steps must be a multiple of --warmup-steps: losses are logged every so many steps")
    return options


if __name__ == "__main__":
    if "--as-trainer" in sys.argv:
        trainer_main(*map(Path, sys.argv[-2:]))
    else:
        main()
