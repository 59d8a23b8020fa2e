"""Runs one function on N real processes joined by a gloo process group, as a Ray Train worker group would.

    results = run_on_ranks(train_a_little, 2, folder)     # [what rank 0 returned, what rank 1 returned]

The function and its arguments are pickled, so the function stands at the top level of a module. Every process is new,
and forked from a server that has done nothing but import the libraries, which would take 6 s in each of them. A rank
that raises makes the call raise RankError with that rank's traceback; the other ranks then have `GRACE_S` to end by
themselves, which shows whether one rank's error hangs the others. Every process is gone when the call returns.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

GRACE_S = 30.0
IMPORTED_ONCE = ["distlm.worker.train", "accelerate", "transformers.models.bert.modeling_bert"]
"""None of them starts a thread or draws a number on import."""


class RankError(AssertionError):
    """One or more ranks raised, died or ran past the deadline; the text holds what each said."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 480.0,
    join_process_group: bool = True,
) -> list[Any]:
    """Call `function(*args)` on `world_size` processes and return their results, rank 0 first.

    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set. With `join_process_group` the
    default gloo group exists already (as in a Ray Train worker), without it the function makes it (as under torchrun).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    port = free_port()
    receivers: dict[Connection, int] = {}
    processes = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(sender, rank, world_size, port, join_process_group, function, args)
            )
            process.start()
            sender.close()
            receivers[receiver] = rank
            processes.append(process)
        return _collect(receivers, world_size, timeout_s)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(receivers: dict[Connection, int], world_size: int, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    while receivers:
        ready = wait(list(receivers), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.update(dict.fromkeys(receivers.values(), "gave no answer before the deadline"))
            break
        for connection in [connection for connection in receivers if connection in ready]:
            rank = receivers.pop(connection)
            try:
                succeeded, value = connection.recv()
            except EOFError:
                succeeded, value = False, "died without an answer"
            if succeeded:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(world_size)]


def _rank_main(
    sender: Connection,
    rank: int,
    world_size: int,
    port: int,
    join_process_group: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        if join_process_group:
            torch.distributed.init_process_group("gloo")
        sender.send((True, function(*args)))
    except BaseException:  # noqa: BLE001 - whatever it is, the caller must hear of it
        sender.send((False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
