"""What a batch job finds out about itself, and which attempt it runs: of a new run, or of the one it had begun."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import CONFIG, end, held_lease, make_attempt, make_run

from distlm.config.attempt import Attempt, load_attempt
from distlm.errors import ExitCode, InfrastructureError, InputError
from distlm.job_run import JobName, final_code, next_attempt, starts_in_vain
from distlm.launchers.base import Job
from distlm.launchers.slurm import SlurmLauncher
from distlm.run_folder import AttemptFolder, RunFolder, read_json, runs_in, write_json
from distlm.slurm import __main__ as slurm_job
from distlm.slurm.__main__ import _requeue, main
from distlm.slurm.allocation import NUM_HEAD_PORTS, PORTS_PER_JOB, Allocation, expand_counts, own_address
from distlm.slurm.ray_nodes import NodeOrder

ENVIRON = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_CPUS_PER_NODE": "4(x2),8"}
ON_SLURM: dict[str, Any] = {"num_workers": 2, "target": "slurm"}
UNKNOWN = "no-such-node.invalid"


def allocation(job_id: str = "17", num_restarts: int = 0) -> Allocation:
    return Allocation(job_id, num_restarts, ("n1", "n2"), ("n1", "n2"), (4, 4), None)


def _run(given: Allocation, what: Path, overrides: list[str]) -> RunFolder:
    return slurm_job._run(JobName("slurm", given.job_id), given, what, overrides)


def _next_attempt(run: RunFolder) -> AttemptFolder:
    return next_attempt(run, JobName("slurm", "17"), SlurmLauncher().check_here, slurm_job._ABANDONED)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first folder of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def fake_scontrol(folder: Path, script: str) -> Path:
    """It appends its arguments to the file that is returned, a line for each call, and does what `script` says."""
    asked, command = folder / "asked", folder / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(asked))}\n{script}\n')
    command.chmod(0o755)
    return asked


# --- the allocation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("4", (4,)),
        ("4(x2)", (4, 4)),
        ("4(x2),8", (4, 4, 8)),
        ("1,16(x1),2(x3)", (1, 16, 2, 2, 2)),
        ("128(x100)", (128,) * 100),
    ],
)
def test_counts_of_nodes(text: str, counts: tuple[int, ...]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "4(x", "4x2", "4,", "four", "-4", "4(2)", "4 ,8"])
def test_what_is_no_list_of_counts_is_told(text: str) -> None:
    with pytest.raises(InputError, match=r"^SLURM_JOB_CPUS_PER_NODE = ") as caught:
        expand_counts(text)
    assert f"= {text}:" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "memory_mib", "num_restarts"),
    [
        ({}, None, 0),
        ({"SLURM_MEM_PER_NODE": "4096", "SLURM_RESTART_COUNT": "2"}, 4096, 2),
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_RESTART_COUNT": ""}, None, 0),
        ({"SLURM_MEM_PER_CPU": "1000", "SLURM_RESTART_COUNT": "0"}, 4000, 0),  # of the node that has fewest CPUs
        ({"SLURM_MEM_PER_CPU": "0"}, None, 0),
        ({"SLURM_MEM_PER_NODE": "", "SLURM_MEM_PER_CPU": ""}, None, 0),
    ],
)
def test_a_job_reads_what_it_has_from_its_environment(
    bin_folder: Path, more: dict[str, str], memory_mib: int | None, num_restarts: int
) -> None:
    asked = fake_scontrol(bin_folder, "printf 'n1\\nn2\\nn3\\n'")
    found = Allocation.from_environ({**ENVIRON, **more})
    names = ("n1", "n2", "n3")
    assert found == Allocation("17", num_restarts, names, names, (4, 4, 8), memory_mib)
    assert asked.read_text() == "show hostnames n[1-3]\nshow node --oneliner n[1-3]\n"


def test_nodes_are_reached_by_the_address_that_slurm_has_for_them(bin_folder: Path) -> None:
    script = (
        'if [ "$2" = hostnames ]; then printf "n1\\nn2\\n"; exit; fi\n'
        'echo "NodeName=n2 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=compute-2 Version=23"\n'
        'echo "NodeName=n1 Arch=x86_64 Version=23"'
    )
    fake_scontrol(bin_folder, script)
    found = Allocation.from_environ({**ENVIRON, "SLURM_JOB_CPUS_PER_NODE": "4(x2)"})
    assert (found.nodes, found.addresses) == (("n1", "n2"), ("n1", "10.1.2.3"))


@pytest.mark.parametrize("missing", ENVIRON)
def test_outside_of_a_job_it_is_told_what_this_is_for(missing: str) -> None:
    with pytest.raises(InputError, match=f"^{missing} is not set: .*distlm render CONFIG --target slurm"):
        Allocation.from_environ({key: value for key, value in ENVIRON.items() if key != missing})


def test_without_arguments_it_is_told_how_it_is_used() -> None:
    with pytest.raises(InputError, match=r"^usage: python -m distlm\.slurm RUN_FOLDER"):
        main([])


def test_jobs_that_may_share_a_node_have_other_ports() -> None:
    first = [allocation(str(job_id)).first_port for job_id in range(99_940, 100_060)]
    assert min(first) > 1024 and max(first) + PORTS_PER_JOB <= 32768, "there the kernel's own begin"
    for index, port in enumerate(first):
        others = first[max(0, index - 30) : index]
        assert all(abs(port - other) >= PORTS_PER_JOB for other in others)
    assert 0 < NUM_HEAD_PORTS < PORTS_PER_JOB
    assert allocation("17").first_port == allocation("17", num_restarts=1).first_port


def test_the_address_is_the_one_that_the_others_reach() -> None:
    assert own_address(()) == "127.0.0.1"
    assert own_address(("127.0.0.1",)) == "127.0.0.1"
    assert own_address(("127.0.0.2", UNKNOWN)) == "127.0.0.1"
    assert own_address((UNKNOWN, "127.0.0.1")) == "127.0.0.1", "the second one is known"


def test_without_a_way_to_the_others_all_of_them_are_named() -> None:
    with pytest.raises(InfrastructureError) as caught:
        own_address((UNKNOWN, f"2.{UNKNOWN}"))
    assert f"{os.uname().nodename} does not know how to reach {UNKNOWN}: " in str(caught.value)
    assert f"; 2.{UNKNOWN}: " in str(caught.value)


@pytest.mark.parametrize("others", [(), ("n2",), ("n2", "n3")])
@pytest.mark.parametrize("memory_bytes", [None, 2**33])
def test_an_order_is_one_line_that_says_all(others: tuple[str, ...], memory_bytes: int | None) -> None:
    order = NodeOrder("n1", "10.0.0.1:20000", True, others, 20000, 4, memory_bytes)
    line = order.to_line()
    assert line.endswith("\n") and line.count("\n") == 1
    assert NodeOrder.from_line(line) == order
    assert hash(NodeOrder.from_line(line)) == hash(order), "others are a tuple again"


# --- which run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config that is seen from the current folder, and whose runs are in `runs` there."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(CONFIG))
    return Path(path.name)


def begin(config: Path, job_id: str = "17", num_restarts: int = 0, overrides: tuple[str, ...] = ()) -> RunFolder:
    """The run of a job that has come as far as to its training."""
    given = allocation(job_id, num_restarts)
    run = _run(given, config, list(overrides))
    Job("slurm", job_id, num_restarts).write(_next_attempt(run))
    return run


def test_a_run_is_named_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert _run(allocation(), Path("runs") / run.run_id, []) == run
    assert _run(allocation(num_restarts=3), run.path, []) == run
    assert run.attempts() == [], "submit has begun one, or the next step does"


@pytest.mark.parametrize("name", ["runs/20260131-235959-3fa9c1", "there"])
def test_a_folder_that_the_node_does_not_see_is_told(config_file: Path, name: str) -> None:
    Path("there").mkdir()
    with pytest.raises(InputError, match=f"{name} is not there on {os.uname().nodename}: .*runs_dir"):
        _run(allocation(), Path(name), [])
    assert not Path("runs").exists()


def test_a_config_that_is_not_there_is_told(config_file: Path) -> None:
    with pytest.raises(InputError, match=r"no-such\.yaml: cannot read the config"):
        _run(allocation(), Path("no-such.yaml"), [])


def test_the_first_start_of_a_job_makes_a_run(config_file: Path) -> None:
    run = _run(allocation(), config_file, ["name=other", "runs_dir=elsewhere", "resources.target=local"])
    assert [found.path for found in runs_in(Path("elsewhere"))] == [run.path]
    (attempt,) = run.attempts()
    written = Attempt.read(attempt)
    assert written.target == "slurm"
    assert written.overrides == ["name=other", "runs_dir=elsewhere", "resources.target=local", "resources.target=slurm"]
    config = load_attempt(run, attempt).config
    assert (config.name, config.resources.target) == ("other", "slurm")
    assert _next_attempt(run) == attempt, "it is the one to run"


def test_a_config_is_checked_before_a_run_is_made(config_file: Path) -> None:
    with pytest.raises(InputError, match=r"slurm\.nodes = 3"):
        _run(allocation(), config_file, ["slurm.nodes=3"])
    assert not Path("runs").exists()


def test_a_job_that_begins_again_goes_on_with_its_run(config_file: Path) -> None:
    other, run, later = begin(config_file, "16"), begin(config_file, "17"), begin(config_file, "18")
    assert len({other, run, later}) == 3
    for restart in (1, 2):
        end(run.attempts()[-1], ExitCode.PREEMPTED)
        assert begin(config_file, "17", restart) == run
        assert len(run.attempts()) == restart + 1
    assert len(runs_in(Path("runs"))) == 3


def test_it_finds_its_run_by_an_older_attempt(config_file: Path) -> None:
    run = begin(config_file)
    end(run.attempts()[-1], ExitCode.PREEMPTED)
    make_attempt(run)  # begun on this machine since
    assert _run(allocation(num_restarts=1), config_file, []) == run


def test_a_job_makes_a_run_of_its_own_unless_it_has_one(config_file: Path) -> None:
    old = begin(config_file, "17")
    new = begin(config_file, "17")  # clusters begin to count their jobs anew
    assert new != old
    assert begin(config_file, "170", 1) not in (old, new), "lost before its run was there"
    Job("other", "18").write(old.attempts()[-1])
    assert begin(config_file, "18", 1) != old, "the job of another target"


# --- which attempt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", list(ExitCode))
def test_a_result_is_final_unless_a_new_start_may_mend_it(tmp_path: Path, code: ExitCode) -> None:
    run = make_run(tmp_path / "runs")
    assert final_code(run) is None
    end(make_attempt(run), code)
    assert final_code(run) == (None if code in (75, 3) else code)
    make_attempt(run)
    assert final_code(run) is None, "the newest attempt has not ended"


def test_the_attempt_that_was_begun_for_the_job_is_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", resources=ON_SLURM)
    end(make_attempt(run), ExitCode.PREEMPTED)
    begun = make_attempt(run)
    Job("slurm", "17").write(begun)
    assert _next_attempt(run) == begun
    assert len(run.attempts()) == 2


@pytest.mark.parametrize("code", [ExitCode.PREEMPTED, ExitCode.INFRASTRUCTURE])
def test_after_an_attempt_that_has_ended_comes_another_one(tmp_path: Path, code: ExitCode) -> None:
    run = make_run(tmp_path / "runs", resources=ON_SLURM)
    first = make_attempt(run, "training.save_steps=7")
    end(first, code, "as it was")
    second = _next_attempt(run)
    assert second.number == 2
    assert Attempt.read(second).changes == ["training.save_steps=7"]
    assert load_attempt(run, second).config.training.save_steps == 7
    assert read_json(first.result_json)["message"] == "as it was"


def test_a_run_of_another_target_goes_on_under_slurm(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    end(make_attempt(run), ExitCode.PREEMPTED)
    second = _next_attempt(run)
    assert Attempt.read(second).target == load_attempt(run, second).config.resources.target == "slurm"
    end(second, ExitCode.PREEMPTED)
    assert Attempt.read(_next_attempt(run)).changes == ["resources.target=slurm"], "once is enough"


def test_a_killed_attempt_gets_a_result(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", resources=ON_SLURM)
    killed, left = make_attempt(run), tmp_path / "left"
    left.mkdir()
    write_json(killed.handle_json, {"host": "n1", "pid": 1, "temporary_root": str(left)})
    assert _next_attempt(run).number == 2
    result = read_json(killed.result_json)
    assert (result["exit_code"], result["cause"]) == (ExitCode.INFRASTRUCTURE, "infrastructure")
    assert "ended by Slurm before it could save" in result["message"]
    assert not left.exists()
    assert final_code(run) is None


@pytest.mark.parametrize("code", [None, ExitCode.PREEMPTED])
def test_a_run_that_another_controller_has_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: ExitCode | None
) -> None:
    monkeypatch.setattr("distlm.job_run._LEASE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("distlm.job_run._LEASE_INTERVAL_S", 0.1)
    run = make_run(tmp_path / "runs", resources=ON_SLURM)
    attempt = make_attempt(run)
    write_json(attempt.handle_json, {"host": "n1", "pid": 1, "temporary_root": ""})
    if code is not None:
        end(attempt, code)
    with held_lease(run), pytest.raises(InputError, match="is being trained by process"):
        _next_attempt(run)
    assert len(run.attempts()) == 1 and attempt.result_json.exists() == (code is not None)


# --- back into the queue ---------------------------------------------------------------------------------------------


def save(run: RunFolder, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def start(run: RunFolder, from_step: int, num_restarts: int = 0) -> Job:
    """Another start of the job."""
    job = Job("slurm", "17", num_restarts, from_step)
    job.write(make_attempt(run))
    return job


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs", resources=ON_SLURM)


def test_the_job_goes_back_into_the_queue(run: RunFolder, bin_folder: Path) -> None:
    asked = fake_scontrol(bin_folder, "")
    job = start(run, 0, num_restarts=4)
    save(run, 10)
    said = _requeue(run, job, 5)
    assert said == "the job goes back into the queue, to go on (restart 5 of 5)"
    assert asked.read_text() == "requeue 17\n"


@pytest.mark.parametrize(("num_restarts", "max_requeues"), [(0, 0), (5, 5), (6, 5)])
def test_a_job_that_has_begun_often_enough_ends(
    run: RunFolder, bin_folder: Path, num_restarts: int, max_requeues: int
) -> None:
    asked = fake_scontrol(bin_folder, "")
    job = start(run, 0, num_restarts)
    save(run, 10)
    said = _requeue(run, job, max_requeues)
    assert said == f"the job has begun again {num_restarts} times (slurm.max_requeues); it ends here"
    assert not asked.exists()


def test_a_job_that_saves_nothing_begins_once_more_and_not_twice(run: RunFolder, bin_folder: Path) -> None:
    asked = fake_scontrol(bin_folder, "")
    assert "goes back" in _requeue(run, start(run, 0), 20)
    said = _requeue(run, start(run, 0, 1), 20)
    assert said == "no step was saved in the job's time, twice; it ends here: give it more time with slurm.time"
    assert asked.read_text() == "requeue 17\n"


def test_what_scontrol_refuses_is_told_in_its_words(run: RunFolder, bin_folder: Path) -> None:
    fake_scontrol(bin_folder, "echo 'Requested operation is presently disabled' >&2\necho ' for job 17' >&2\nexit 1")
    said = _requeue(run, start(run, 0), 20)
    assert said == (
        "the job could not be put back into the queue: Requested operation is presently disabled for job 17"
    )


@pytest.mark.parametrize(
    ("from_steps", "saved", "goes_on"),
    [
        ([0], [], True),  # once is no proof
        ([0], [10], True),
        ([0, 0], [], False),
        ([0, 0], [10], True),
        ([0, 10], [10], True),  # the start before has saved
        ([0, 10, 10], [10], False),
        ([0, 10, 10], [10, 20], True),
        ([0, 10, 20], [10, 20], True),
        ([0, 0, 10, 10], [10], False),
    ],
)
def test_whether_steps_are_saved(run: RunFolder, from_steps: list[int], saved: list[int], goes_on: bool) -> None:
    for step in saved:
        save(run, step)
    for number, step in enumerate(from_steps):
        job = start(run, step, number)
    assert (starts_in_vain(run, JobName(job.target, job.id)) < 2) == goes_on


@pytest.mark.parametrize("names_the_job", [True, False])
def test_a_second_attempt_in_the_jobs_time_is_no_second_start_of_it(run: RunFolder, names_the_job: bool) -> None:
    """The job's own command begins it, where the first one has lost its controller or Ray."""
    job = start(run, 0)
    end(run.attempts()[-1], ExitCode.INFRASTRUCTURE)
    second = make_attempt(run)
    if names_the_job:
        job.write(second)
    assert starts_in_vain(run, JobName(job.target, job.id)) == 1


def test_what_was_begun_elsewhere_is_no_start_of_the_job(run: RunFolder) -> None:
    save(run, 10)
    end(make_attempt(run), ExitCode.PREEMPTED)
    start(run, 10)
    assert starts_in_vain(run, JobName("slurm", "17")) == 1
