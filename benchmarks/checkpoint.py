"""Saving and loading checkpoints against torch.save, DeepSpeed and torch.distributed.checkpoint (DCP), in one run.

    python benchmarks/checkpoint.py [--world-size 2] [--hidden-size 512] [--layers 6] [--repeat 5] [--folder DIR]

Trains two steps of a BERT at ZeRO 2 on CPU workers, then saves and loads its state (fp32 weights and Adam moments, 12
bytes per parameter) in each way, interleaved, so that a busy moment of the machine hits all of them. Prints medians:

    blocked   how long training stands still for a save
    until saved, MB/s    until the files are written; distlm's are then hashed, synced to the disk and committed by
                         rename, the others' only handed to the operating system
    load, MB/s           with the files in the page cache

The others save what their users save: torch.save each rank's own tensors in one file per rank (once more with the file
synced to the disk, as distlm's are), DeepSpeed its own checkpoint, DCP the same tensors as torch.save.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Action = Callable[[Path], Any]


def worker(rank: int, options: argparse.Namespace, port: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.world_size),
        LOCAL_WORLD_SIZE=str(options.world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    engine = trained_engine(options)
    savers, loaders = ways(engine, folder)
    results: dict[str, list[float]] = {}
    for repeat in range(options.repeat + 1):  # the first round warms up and is not counted
        for name, save in savers.items():
            if rank == 0:
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / name).mkdir()
            times = timed(save, folder / name)
            if repeat:
                for what, value in times.items():
                    results.setdefault(f"{name} {what}", []).append(value)
        for name, load in loaders.items():
            seconds = timed(load, folder / name)["blocked"]
            if repeat:
                results.setdefault(f"{name} load", []).append(seconds)
    if rank == 0:
        report(results, list(savers), state_bytes(engine))
    dist.barrier()
    dist.destroy_process_group()


def trained_engine(options: argparse.Namespace) -> Any:
    """A ZeRO-2 engine whose optimizer has moments."""
    from transformers import BertConfig, BertForMaskedLM

    from distlm.worker.engine import EngineSettings, build_optimizer, make_accelerator, parameter_groups, prepare

    accelerator = make_accelerator(EngineSettings(zero_stage=2))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64, intermediate_size=4 * options.hidden_size,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    optimizer = build_optimizer(parameter_groups(model, 0.01), learning_rate=1e-4)
    engine = prepare(accelerator, model, optimizer)
    tokens = torch.randint(0, 2000, (1, 16))
    for _ in range(2):
        accelerator.backward(engine(input_ids=tokens, labels=tokens).loss)
    return engine


def state_bytes(engine: Any) -> int:
    return 12 * sum(p.numel() for p in engine.module.parameters())


def ways(engine: Any, folder: Path) -> tuple[dict[str, Action], dict[str, Action]]:
    """How to save into a folder (which is empty then) and how to load from it. A save returns how to await its end."""
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

    from distlm.checkpoint.manifest import Progress
    from distlm.checkpoint.store import Checkpoint, CheckpointStore
    from distlm.worker import zero_state
    from distlm.worker.checkpoint import CheckpointSaver, load_checkpoint

    rank = dist.get_rank()
    progress = Progress(sample_position=0, epoch=0)
    stores = {name: CheckpointStore(folder / name) for name in ("distlm", "distlm async")}
    synchronous = CheckpointSaver(engine, stores["distlm"], seed=0, asynchronous=False)
    asynchronous = CheckpointSaver(engine, stores["distlm async"], seed=0)

    def held() -> dict[str, torch.Tensor]:
        return {
            f"{rank}:{part.name}:{kind}": tensor
            for part in zero_state.fragments(engine)
            for kind, tensor in part.tensors.items()
        }

    def save_async(path: Path) -> Callable[[], None]:
        asynchronous.save(1, progress)
        return asynchronous.wait

    def load_distlm(path: Path) -> None:
        load_checkpoint(engine, Checkpoint(1, path / "step-00000001"), seed=0)

    def verify_and_load(path: Path) -> None:
        if rank == 0:
            CheckpointStore(path).latest_good()
        dist.barrier()
        load_distlm(path)

    def torch_load(path: Path) -> None:
        saved = torch.load(path / f"{rank}.pt", weights_only=True)
        for name, tensor in held().items():
            tensor.copy_(saved[name])

    def torch_save_synced(path: Path) -> None:
        with open(path / f"{rank}.pt", "wb") as file:
            torch.save(held(), file)
            file.flush()
            os.fsync(file.fileno())

    savers: dict[str, Action] = {
        "distlm": lambda path: synchronous.save(1, progress),
        "distlm async": save_async,
        "torch.save": lambda path: torch.save(held(), path / f"{rank}.pt"),
        "torch.save synced": torch_save_synced,
        "DeepSpeed": lambda path: engine.save_checkpoint(str(path), tag="1"),
        "DCP": lambda path: state_dict_saver.save(held(), checkpoint_id=path),
        "DCP async": lambda path: _waiting_for(state_dict_saver.async_save(held(), checkpoint_id=path)),
    }
    loaders: dict[str, Action] = {
        "distlm": load_distlm,
        "distlm async": verify_and_load,
        "torch.save": torch_load,
        "DeepSpeed": lambda path: engine.load_checkpoint(str(path), tag="1"),
        "DCP": lambda path: state_dict_loader.load(held(), checkpoint_id=path),
    }
    return savers, loaders


def _waiting_for(future: Any) -> Callable[[], None]:
    return lambda: future.result() and None


def timed(action: Action, path: Path) -> dict[str, float]:
    """Seconds that the slowest rank was blocked by the action, and until its work was done."""
    dist.barrier()
    started = time.perf_counter()
    wait = action(path)
    blocked = time.perf_counter() - started
    if callable(wait):
        wait()
    total = torch.tensor([blocked, time.perf_counter() - started])
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return {"blocked": float(total[0]), "until saved": float(total[1])}


def report(results: dict[str, list[float]], names: list[str], size_bytes: int) -> None:
    median = {name: statistics.median(times) for name, times in results.items()}
    megabytes = size_bytes / 1e6
    print(f"state: {megabytes:.0f} MB on {dist.get_world_size()} workers")
    print(f"{'':18s}{'blocked s':>10s}{'until saved s':>15s}{'MB/s':>8s}{'load s':>9s}{'MB/s':>8s}")
    for name in names:
        blocked, saved, load = (median.get(f"{name} {what}") for what in ("blocked", "until saved", "load"))
        assert blocked is not None and saved is not None
        loading = f"{load:9.3f}{megabytes / load:8.0f}" if load else ""
        print(f"{name:18s}{blocked:10.3f}{saved:15.3f}{megabytes / saved:8.0f}{loading}")
    stall = median["distlm async blocked"] / median["distlm blocked"]
    print(f"\nstall of an asynchronous save: {stall:.1%} of a synchronous one (goal: at most 15 %)")
    print("distlm async's load includes reading and comparing every hash, as at the start of a resume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    options = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        spawn(worker, (options, port, Path(folder)), nprocs=options.world_size)


if __name__ == "__main__":
    main()
