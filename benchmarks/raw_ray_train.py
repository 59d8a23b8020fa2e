"""The peer of recovery.py: a small BERT under Ray Train V2 as its documentation sets it up, with Ray's own settings.

    python benchmarks/raw_ray_train.py FOLDER MIN_WORKERS MAX_WORKERS

Trains until it is killed; joins the cluster of RAY_ADDRESS, else starts Ray here. Rank 0 appends a line to
FOLDER/steps.jsonl after each step: {"step": ..., "num_workers": ..., "at_s": ...}. It imports what distlm's workers do.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAVE_STEPS = 20


def train(told: dict[str, Any]) -> None:
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import ray.train
    import ray.train.torch
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    model: Any = ray.train.torch.prepare_model(BertForMaskedLM(config))
    inner = getattr(model, "module", model)  # a lone worker has no DistributedDataParallel around it
    optimizer = torch.optim.AdamW(model.parameters())
    step = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    context = ray.train.get_context()
    while True:
        step += 1
        tokens = torch.randint(512, (16, 64))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if context.get_world_rank() == 0:
            line = {"step": step, "num_workers": context.get_world_size(), "at_s": time.time()}
            with open(told["steps"], "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if step % SAVE_STEPS == 0:
            with tempfile.TemporaryDirectory() as folder:
                saved = None
                if context.get_world_rank() == 0:
                    state = {"model": inner.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, Path(folder) / "state.pt")
                    saved = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"step": step}, checkpoint=saved)


def main() -> None:
    folder, least, most = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    if "RAY_ADDRESS" not in os.environ:
        ray.init(num_cpus=most, include_dashboard=False, object_store_memory=100 * 2**20)
    TorchTrainer(
        train,
        train_loop_config={"steps": str(folder / "steps.jsonl")},
        scaling_config=ray.train.ScalingConfig(num_workers=(least, most) if least < most else most),
        run_config=ray.train.RunConfig(
            name="peer", storage_path=str(folder / "storage"), failure_config=ray.train.FailureConfig(max_failures=99)
        ),
    ).fit()


if __name__ == "__main__":
    main()
