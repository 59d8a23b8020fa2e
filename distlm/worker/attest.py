"""Attestation before step 1: is what is about to train what the config asks for?

Every rank states facts about itself (`gather_facts`), and each rank checks all of them (`attest`), so that all stop
together with the same reason. The checks are pure and need no torch.
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from distlm.errors import AttestationError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class RankFacts:
    """What one rank says about itself.

    `zero_stage` is that of the optimizer object that really runs, -1 if it is of no known kind. The numels count fp32
    weights: `local_state_numel` those that this rank's Adam steps, padding included; `total_state_numel` all trainable
    ones of the model, in `num_parameters` tensors. `device` is "cpu" or "cuda" with the GPU's UUID, because an index
    depends on what a process may see. `sample_positions` are the global positions that this rank trains in step 1, over
    all micro batches; `probes` maps some positions, the same on every rank, to a hash of the sample there.
    """

    rank: int
    world_size: int
    hostname: str
    pid: int
    device: str
    distributed_type: str
    zero_stage: int
    is_deepspeed_engine: bool
    local_state_numel: int
    total_state_numel: int
    num_parameters: int
    sample_positions: tuple[int, ...]
    probes: Mapping[int, str]


@dataclass(frozen=True)
class Expected:
    """What the run asks for: `first_position` is the global position of the first sample of the coming step."""

    world_size: int
    zero_stage: int
    device_type: str
    first_position: int
    global_batch_size: int


def gather_facts(
    engine: DeepSpeedEngine, accelerator: Accelerator, sample_positions: Sequence[int], probes: Mapping[int, str]
) -> list[RankFacts]:
    """Every rank's facts, rank 0 first, on every rank. Collective."""
    import deepspeed
    import torch

    from distlm.worker import zero_state

    is_deepspeed = isinstance(engine, deepspeed.DeepSpeedEngine)
    stage = zero_state.actual_zero_stage(engine) if is_deepspeed else -1
    held = sum(flat.numel() for flat in zero_state.flat_weights(engine)) if stage >= 0 else 0
    shapes = zero_state.trainable_shapes(engine) if is_deepspeed else {}
    facts = RankFacts(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        hostname=socket.gethostname(),
        pid=os.getpid(),
        device=_device_identity(accelerator.device),
        distributed_type=accelerator.distributed_type.value,
        zero_stage=stage,
        is_deepspeed_engine=is_deepspeed,
        local_state_numel=held,
        total_state_numel=sum(torch.Size(shape).numel() for shape in shapes.values()),
        num_parameters=len(shapes),
        sample_positions=tuple(sample_positions),
        probes=dict(probes),
    )
    gathered: list[RankFacts] = [facts] * facts.world_size
    torch.distributed.all_gather_object(gathered, facts)
    return gathered


def _device_identity(device: torch.device) -> str:
    import torch

    return f"cuda:{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else device.type


def attest(facts: Sequence[RankFacts], expected: Expected) -> None:
    """Check the gathered facts of all ranks against what the run asks for.

    Raises:
        AttestationError: with the first thing that is wrong and what to do.
    """
    _attest_ranks(facts, expected)
    _attest_devices(facts, expected)
    _attest_engine(facts, expected)
    _attest_sharding(facts, expected)
    _attest_samples(facts, expected)


def _fail(reason: str, remedy: str) -> NoReturn:
    raise AttestationError(f"stopped before step 1: {reason}; {remedy}")


def _attest_ranks(facts: Sequence[RankFacts], expected: Expected) -> None:
    sizes = {fact.world_size for fact in facts}
    if len(facts) != expected.world_size or sizes != {expected.world_size}:
        _fail(
            f"{expected.world_size} workers were asked for, but {len(facts)} answered and believe in {sorted(sizes)}",
            "check that RANK and WORLD_SIZE reach every worker",
        )
    if [fact.rank for fact in facts] != list(range(expected.world_size)):
        _fail(f"the ranks are {[fact.rank for fact in facts]}", "give each worker its own RANK")


def _attest_devices(facts: Sequence[RankFacts], expected: Expected) -> None:
    for fact in facts:
        if fact.device.partition(":")[0] != expected.device_type:
            _fail(
                f"rank {fact.rank} on {fact.hostname} uses {fact.device}, not {expected.device_type}",
                "check what devices that worker may use",
            )
    places: dict[tuple[str, object], list[int]] = defaultdict(list)
    for fact in facts:
        places[fact.hostname, fact.pid if fact.device == "cpu" else fact.device].append(fact.rank)
    for (hostname, place), ranks in places.items():
        if len(ranks) > 1:
            what = "process" if isinstance(place, int) else "device"
            _fail(f"ranks {ranks} share {what} {place} on {hostname}", "start one process per device")


def _attest_engine(facts: Sequence[RankFacts], expected: Expected) -> None:
    for fact in facts:
        if not fact.is_deepspeed_engine or fact.distributed_type != "DEEPSPEED":
            _fail(
                f"rank {fact.rank} trains {fact.distributed_type} without DeepSpeed",
                "check for ACCELERATE_* variables in the workers' environment",
            )
        if fact.zero_stage != expected.zero_stage:
            _fail(
                f"rank {fact.rank} runs ZeRO stage {fact.zero_stage}, the config asks for {expected.zero_stage}",
                "check the installed DeepSpeed version",
            )


def _attest_sharding(facts: Sequence[RankFacts], expected: Expected) -> None:
    totals = {fact.total_state_numel for fact in facts}
    if len(totals) != 1:
        _fail(f"the ranks count {sorted(totals)} trainable parameters", "load the same model on every rank")
    total = totals.pop()
    if expected.zero_stage == 0:
        for fact in facts:
            if fact.local_state_numel != total:
                _fail(
                    f"rank {fact.rank} optimizes {fact.local_state_numel} of {total} parameters, at stage 0 all",
                    "check the installed DeepSpeed version",
                )
        return
    held = sum(fact.local_state_numel for fact in facts)
    if held < total:
        _fail(f"the ranks together optimize {held} of {total} parameters", "check the installed DeepSpeed version")
    # ZeRO pads each tensor (stage 3) or each group (1 and 2) to a multiple of the world size: under 2 elements a rank.
    fair_share = total / expected.world_size + 2 * facts[0].num_parameters
    for fact in facts:
        if fact.local_state_numel > fair_share:
            _fail(
                f"the state is not sharded: rank {fact.rank} holds {fact.local_state_numel} of {total} parameters at"
                f" ZeRO stage {fact.zero_stage} with {expected.world_size} workers",
                "check that every worker joined the same process group",
            )


def _attest_samples(facts: Sequence[RankFacts], expected: Expected) -> None:
    owner: dict[int, int] = {}
    for fact in facts:
        for position in fact.sample_positions:
            if position in owner:
                _fail(
                    f"sample position {position} is trained by rank {owner[position]} and by rank {fact.rank}",
                    "the ranks do not share one data order: check the world size they see",
                )
            owner[position] = fact.rank
    wanted = range(expected.first_position, expected.first_position + expected.global_batch_size)
    if wrong := sorted(owner.keys() ^ set(wanted)):
        what = "is trained by no rank" if wrong[0] in wanted else "does not belong to the step"
        _fail(
            f"sample position {wrong[0]} {what} (the step is {wanted.start} to {wanted.stop - 1}; {len(wrong)} differ)",
            "check gradient accumulation times micro batch size times workers against the global batch size",
        )
    for fact in facts[1:]:
        if fact.probes.keys() != facts[0].probes.keys():
            _fail(f"rank {fact.rank} probed other positions than rank 0", "probe the same positions on every rank")
        for position, fingerprint in facts[0].probes.items():
            if fact.probes[position] != fingerprint:
                _fail(
                    f"the sample at position {position} differs between rank 0 on {facts[0].hostname} and rank"
                    f" {fact.rank} on {fact.hostname}",
                    "check that both read the same tokenised data",
                )
