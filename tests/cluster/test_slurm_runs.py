"""Runs under a real Slurm: they go on over everything that ends a job, and nothing of them is left on any node."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from elastic_runs import SETTINGS, losses, require_each_step_once
from lab import START_TIMEOUT_S, Lab, job_id, wait_for_step
from place import Command, Place, wait_until

from distlm.errors import ExitCode
from distlm.run_folder import RunFolder, read_json
from distlm.run_status import run_status

PROJECT = Path(__file__).parents[2]
TWO_NODES = (
    "--target", "slurm", "slurm.nodes=2", "slurm.memory_gib_per_node=3", "slurm.time=30", "resources.num_workers=2",
    "training.max_steps=400", "training.save_steps=50", "resources.time_to_save_s=20", *SETTINGS,
)  # fmt: skip
STEPS = 400
EQUAL = 5e-5
"""Relative difference of losses whose sums were made in another order."""


def submit(place: Place, *overrides: str) -> tuple[Command, RunFolder]:
    command = place.start("submit", "run.yaml", *TWO_NODES, *overrides)
    return command, command.run


def status(place: Place, run: RunFolder) -> dict[str, object]:
    command = place.start("status", str(run.path), "--json")
    assert command.wait() == ExitCode.SUCCEEDED, command.err
    return json.loads(command.out)


def attempts_ended(run: RunFolder) -> list[int]:
    return [read_json(attempt.result_json)["exit_code"] for attempt in run.attempts()]


def test_a_run_goes_on_over_requeues_lost_nodes_and_targets(lab: Lab, place: Place) -> None:
    """Two workers on two nodes, put back into the queue at the time limit and by the loss of a node, then cancelled by
    scancel, and ended on one machine: every step is there once, as of a straight run."""
    command, run = submit(place)
    wait_for_step(run, 60)
    job = job_id(run)
    assert {read_json(path)["num_restarts"] for path in run.path.glob("attempts/*/job.json")} == {0}
    hosts = {path.name for path in run.attempts()[-1].logs.glob("ray-*.log")}
    assert hosts == {"ray-node1.log", "ray-node2.log"}

    lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")  # it has run for most of that
    wait_until(lambda: status(place, run)["state"] == "pending", START_TIMEOUT_S, "the job to wait again")
    assert "SIGUSR2" in read_json(run.attempts()[0].result_json)["message"]
    lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    lab.require_nothing_left()
    assert place.mlflow_run(run).info.status == "KILLED"
    told = status(place, run)["job"]
    assert isinstance(told, dict) and told["target_state"] == "PENDING" and "BeginTime" in str(told["reason"])

    wait_until(lambda: len(run.attempts()) == 2, START_TIMEOUT_S, "the second attempt")
    at_requeue = max(losses(run))
    wait_for_step(run, at_requeue + 60)
    lab.power_off(2)
    lab.wait_for_state(job, "PENDING")
    lab.boot(2)
    wait_until(lambda: len(run.attempts()) == 3, START_TIMEOUT_S, "the third attempt")
    at_loss = max(losses(run))
    wait_for_step(run, at_loss + 60)
    assert read_json(run.attempts()[-1].job_json)["num_restarts"] == 2

    lab.run("scancel", job)
    assert command.wait() in (ExitCode.PREEMPTED, ExitCode.CANCELLED), (command.out, command.err)
    lab.wait_for_state(job, "CANCELLED")
    lab.require_nothing_left()
    assert place.mlflow_run(run).info.status == "KILLED"

    here = place.start("resume", str(run.path), "--target", "local")
    assert here.wait() == ExitCode.SUCCEEDED, (here.out, here.err)
    found = require_each_step_once(place, run)
    assert max(found) == STEPS
    assert [attempt.target for attempt in run_status(run).attempts] == ["slurm"] * 3 + ["local"]

    straight = place.start(
        "submit", "run.yaml", *SETTINGS, f"training.max_steps={STEPS}", "training.save_steps=50",
        "resources.num_workers=2", "tracking.report_to=[]",
    )  # fmt: skip
    assert straight.wait() == ExitCode.SUCCEEDED, straight.err
    assert found == pytest.approx(losses(straight.run), rel=EQUAL)


def test_the_shipped_script_trains(lab: Lab, place: Place) -> None:
    """`sbatch slurm/pretrain.sbatch`, as it is, in the project's folder; its exit code is the job's."""
    for name in ("configs", "slurm", ".venv"):
        (place.folder / name).symlink_to(PROJECT / name)
    lab.run("sbatch", "--wait", "--parsable", "slurm/pretrain.sbatch", cwd=place.folder)
    (run,) = [RunFolder(path.parent) for path in place.runs_dir.glob("*/run.yaml")]
    assert attempts_ended(run) == [ExitCode.SUCCEEDED]
    loss = {step: value for step, value in losses(run).items() if step > 70}
    assert max(loss.values()) < 6.6, loss  # 8.4 at first
    output = next(place.folder.glob("slurm-*.out")).read_text()
    assert "succeeded: model in" in output
    shutil.rmtree(run.runs_dir / "cache")
    lab.require_nothing_left()


def test_a_job_in_the_queue_says_why_it_waits(lab: Lab, place: Place) -> None:
    other = place.folder / "other.sh"
    other.write_text("#!/bin/bash\nsleep 600\n")
    first, _ = (
        lab.run("sbatch", "--parsable", "--exclusive", "--nodes=2", "--output=/dev/null", str(other), cwd=place.folder)
        for _ in range(2)
    )
    lab.wait_for_state(first, "RUNNING")
    command = place.start("submit", "run.yaml", *TWO_NODES, "--detach")
    assert command.wait() == ExitCode.SUCCEEDED, command.err
    run = command.run
    assert "pending: Priority" in command.out or "pending: Resources" in command.out
    assert "1 job before it in its partition" in command.out
    listed = place.start("list", "--runs-dir", str(run.runs_dir))
    assert listed.wait() == ExitCode.SUCCEEDED and "pending" in listed.out

    again = place.start("resume", str(run.path), "--target", "local")
    assert again.wait() == ExitCode.BAD_INPUT and "has a job already" in again.err
    follower = place.start("logs", str(run.path), "-f")
    follower.wait_for("pending")
    cancelled = place.start("cancel", str(run.path))
    assert cancelled.wait() == ExitCode.SUCCEEDED, cancelled.err
    assert f"slurm job {job_id(run)} of run {run.run_id} is taken from the queue" in cancelled.out
    assert follower.wait() == ExitCode.CANCELLED
    lab.run("scancel", "--name=other.sh")
    assert read_json(run.attempts()[-1].result_json)["exit_code"] == ExitCode.CANCELLED
    assert status(place, run)["state"] == "cancelled"


def test_what_slurm_refuses_is_said_in_its_words(place: Place) -> None:
    command = place.start("submit", "run.yaml", *TWO_NODES, "slurm.partition=nowhere")
    assert command.wait() == ExitCode.BAD_INPUT
    assert "sbatch refuses the job: sbatch: error: invalid partition specified: nowhere" in command.err


def test_storage_that_is_not_shared_is_named(lab: Lab, place: Place) -> None:
    """/tmp is each node's own. Sent from the login host, the run's folder is on no node; made by the job itself, it is
    on the first one only."""
    command = place.start("submit", "run.yaml", *TWO_NODES, "runs_dir=/tmp/own-runs")
    assert command.wait() == ExitCode.INFRASTRUCTURE, (command.out, command.err)
    assert "can its nodes write to its folder?" in command.out + command.err
    lab.run("rm", "-r", "/tmp/own-runs")

    script = place.folder / "own.sbatch"
    rendered = place.start("render", "run.yaml", *TWO_NODES, "runs_dir=/tmp/own-runs")
    assert rendered.wait() == ExitCode.SUCCEEDED
    script.write_text(rendered.out)
    job = lab.run("sbatch", "--parsable", str(script), cwd=place.folder)
    lab.wait_for_state(job, "FAILED")
    assert lab.job(job)["ExitCode"] == f"{ExitCode.BAD_INPUT}:0"
    output = (place.folder / f"slurm-{job}.out").read_text()
    assert "every node must share /tmp/own-runs, but node2 cannot write there" in output
    lab.on_node(1, "rm", "-r", "/tmp/own-runs")
    lab.require_nothing_left()
