"""Each attestation check, broken on purpose by editing what the ranks say. No torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from distlm.errors import AttestationError
from distlm.worker.attest import Expected, RankFacts, attest

TOTAL = 1000
NUM_PARAMETERS = 10
FIRST, GLOBAL_BATCH = 64, 8


def healthy(world_size: int = 2, zero_stage: int = 2, device: str = "cpu") -> list[RankFacts]:
    """Facts as a good run would state them: two ranks on one host, micro batches of 2, dealt out in turn."""
    return [
        RankFacts(
            rank=rank,
            world_size=world_size,
            hostname="node-a",
            pid=100 + rank,
            device=device if device == "cpu" else f"{device}:GPU-{rank}",
            distributed_type="DEEPSPEED",
            zero_stage=zero_stage,
            is_deepspeed_engine=True,
            local_state_numel=TOTAL if zero_stage == 0 else TOTAL // world_size + 2,
            total_state_numel=TOTAL,
            num_parameters=NUM_PARAMETERS,
            sample_positions=tuple(p for p in range(FIRST, FIRST + GLOBAL_BATCH) if p // 2 % world_size == rank),
            probes={64: "aa", 71: "bb"},
        )
        for rank in range(world_size)
    ]


def expected(world_size: int = 2, zero_stage: int = 2, device_type: str = "cpu") -> Expected:
    return Expected(world_size, zero_stage, device_type, first_position=FIRST, global_batch_size=GLOBAL_BATCH)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world_size", "device"), [(1, "cpu"), (2, "cpu"), (4, "cuda")])
def test_a_healthy_run_passes(zero_stage: int, world_size: int, device: str) -> None:
    attest(healthy(world_size, zero_stage, device), expected(world_size, zero_stage, device))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"world_size": 1}, "2 workers were asked for"),
        ({"rank": 0}, r"the ranks are \[0, 0\]"),
        ({"pid": 100}, r"ranks \[0, 1\] share process 100 on node-a"),
        ({"device": "cuda:GPU-1"}, "rank 1 on node-a uses cuda:GPU-1, not cpu"),
        ({"distributed_type": "MULTI_CPU"}, "trains MULTI_CPU without DeepSpeed"),
        ({"is_deepspeed_engine": False}, "without DeepSpeed"),
        ({"zero_stage": 1}, "rank 1 runs ZeRO stage 1, the config asks for 2"),
        ({"total_state_numel": 999}, r"the ranks count \[999, 1000\]"),
        ({"local_state_numel": TOTAL}, "not sharded: rank 1 holds 1000 of 1000"),
        ({"local_state_numel": 10}, "together optimize 512 of 1000"),
        ({"sample_positions": (64, 65, 68, 69)}, "position 64 is trained by rank 0 and by rank 1"),
        ({"sample_positions": (66, 67, 70)}, "position 71 is trained by no rank"),
        ({"sample_positions": (66, 67, 70, 71, 72)}, "position 72 does not belong to the step"),
        ({"probes": {64: "aa", 71: "other"}}, "sample at position 71 differs between rank 0"),
        ({"probes": {64: "aa"}}, "rank 1 probed other positions"),
    ],
)
def test_each_broken_fact_stops_the_run(changes: dict[str, Any], reason: str) -> None:
    rank_0, rank_1 = healthy()
    with pytest.raises(AttestationError, match=f"^stopped before step 1: .*{reason}.*; "):
        attest([rank_0, replace(rank_1, **changes)], expected())


def test_an_absent_worker_stops_the_run() -> None:
    with pytest.raises(AttestationError, match="2 workers were asked for, but 1 answered"):
        attest(healthy()[:1], expected())


def test_two_ranks_on_one_gpu_stop_the_run_but_not_on_two_hosts() -> None:
    facts = healthy(device="cuda")
    facts[1] = replace(facts[1], device=facts[0].device)
    with pytest.raises(AttestationError, match=r"ranks \[0, 1\] share device cuda:GPU-0"):
        attest(facts, expected(device_type="cuda"))
    facts[1] = replace(facts[1], hostname="node-b")
    attest(facts, expected(device_type="cuda"))


def test_stage_0_must_be_replicated() -> None:
    facts = healthy(zero_stage=0)
    facts[1] = replace(facts[1], local_state_numel=TOTAL // 2)
    with pytest.raises(AttestationError, match="rank 1 optimizes 500 of 1000 parameters, at stage 0 all"):
        attest(facts, expected(zero_stage=0))


def test_the_checks_import_no_torch() -> None:
    code = "import sys, distlm.worker.attest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
