"""The peer of the training benchmarks: a timed process of the Hugging Face Trainer, as its documentation sets it up."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import peak_memory_gib

if TYPE_CHECKING:
    from torch import nn

WEIGHT_DECAY, MAX_GRAD_NORM = 0.01, 1.0


@dataclass(frozen=True)
class Measured:
    """What one training said."""

    seconds: float
    """From the end of the warm-up to the end of the last step."""
    loss: float
    """Mean since the warm-up."""
    peak_gib: float


def train_and_time(
    model: nn.Module,
    samples: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    result: Path,
    *,
    warmup_steps: int,
    precision: str,
    **arguments: Any,
) -> None:
    """Train a process's share under torchrun with DistributedDataParallel; rank 0 writes what it measured to `result`.

    `warmup_steps` are not timed, and each so many the loss is logged. `arguments` are TrainingArguments.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Clock(TrainerCallback):
        began_s = peak_gib = seconds = 0.0

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if state.global_step == warmup_steps:
                self.began_s = time.perf_counter()
            elif state.global_step == state.max_steps:
                self.seconds, self.peak_gib = time.perf_counter() - self.began_s, peak_memory_gib()

    clock = Clock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(result.parent / "trainer"),
            use_cpu=True,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            bf16=precision == "bf16",
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            # By default Trainer 5 multiplies the loss of a BERT, which is a mean already, by the number of workers.
            average_tokens_across_devices=False,
            logging_steps=warmup_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=samples,
        data_collator=collate,
        callbacks=[clock],
    )
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e and e["step"] > warmup_steps]
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps(asdict(Measured(clock.seconds, statistics.mean(losses), clock.peak_gib))))
    torch.distributed.destroy_process_group()  # else a process may abort when it ends, with the gloo threads running
