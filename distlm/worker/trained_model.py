"""A run's model as a checkpoint has it, in one process: for predictions and evaluations after training.

    model, tokenizer, step = load_trained_model(run, "best")

The model is built as the workers build it, from init/model and with an adapter from init/adapter, and what was trained
is read from the checkpoint. So all weights, and adapters of every method, take the same way, and nothing is written.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from distlm.checkpoint.manifest import Manifest
from distlm.checkpoint.reader import CheckpointReader
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.checkpoint.tensor_file import CHUNK_BYTES
from distlm.config.attempt import current_tree
from distlm.data.tokenize import load_tokenizer
from distlm.errors import CheckpointError, InputError
from distlm.run_folder import RunFolder
from distlm.worker.export import choose_checkpoint
from distlm.worker.model import load_model

_ITEM_BYTES = 4  # fp32


def load_trained_model(run: RunFolder, wanted: str | None) -> tuple[nn.Module, PreTrainedTokenizerFast, int]:
    """The model on the CPU, in fp32 and evaluation mode, its tokenizer, and the step of the checkpoint.

    Args:
        wanted: last, best or a step, as for `distlm.worker.export.choose_checkpoint`.

    Raises:
        InputError: there is no such checkpoint, or the run's folder lacks something.
        CheckpointError: the checkpoint is damaged, or is not of the model in init/.
    """
    checkpoint, manifest = choose_checkpoint(run, wanted)
    return load_model_of(run, checkpoint, manifest), tokenizer_of(run), manifest.step


def load_verified_step(run: RunFolder, step: int) -> nn.Module:
    """The same for a checkpoint that was verified just now, by the process that asks for it."""
    store = CheckpointStore(run.checkpoints)
    known = {checkpoint.step: checkpoint for checkpoint in store.checkpoints()}
    if step not in known:
        raise CheckpointError(f"the checkpoint of step {step} of run {run.run_id} has gone")
    return load_model_of(run, known[step], store.manifest(known[step]))


def tokenizer_of(run: RunFolder) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(run.init / "tokenizer"), needs_mask=False)


def load_model_of(run: RunFolder, checkpoint: Checkpoint, manifest: Manifest) -> nn.Module:
    """The model of a verified checkpoint; see `load_trained_model`."""
    tree = current_tree(run)
    if not (run.init / "model").is_dir():
        raise InputError(f"{run.init / 'model'} is missing: the run was never prepared, or it was deleted")
    attention = tree["model"].get("attn_implementation")
    model: Any = load_model(
        run.init / "model",
        None if attention == "flash_attention_2" else attention,  # which needs half precision, and the same is computed
        task=tree.get("task", {}).get("type", "masked-lm"),
    )
    if (run.init / "adapter").is_dir():
        from distlm.worker.adapter import load_adapter

        model = load_adapter(model, run.init / "adapter")
    _fill(model, CheckpointReader(checkpoint, manifest), run)
    evaluated: nn.Module = model.eval().requires_grad_(False)
    return evaluated


def _fill(model: nn.Module, reader: CheckpointReader, run: RunFolder) -> None:
    """Read all that was trained. Raises CheckpointError unless it is exactly what the model trains."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = {parameter.name: parameter.shape for parameter in reader.manifest.parameters}
    if differing := sorted(trained.keys() ^ saved.keys()):
        where = f"the model in {run.init}" if differing[0] in trained else "the checkpoint"
        raise CheckpointError(
            f"step {reader.manifest.step} of run {run.run_id} is of another model: only {where} has {differing[0]}"
        )
    for name, parameter in trained.items():
        if list(parameter.shape) != saved[name]:
            raise CheckpointError(
                f"the checkpoint's parameter {name} has the shape {saved[name]}, and {list(parameter.shape)} in "
                f"{run.init}"
            )
        array: Any = parameter.detach().view(-1).numpy()
        whole = memoryview(array).cast("B")
        for start in range(0, len(whole), CHUNK_BYTES):
            reader.read_into(whole[start : start + CHUNK_BYTES], name, "weight", start // _ITEM_BYTES)
