"""What Slurm says about a job, in every word of it, and what becomes of that; and how its commands are asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from distlm.errors import InfrastructureError, InputError
from distlm.launchers import slurm
from distlm.launchers.base import Job, JobState, JobStatus, Request
from distlm.launchers.slurm import SlurmLauncher
from distlm.launchers.slurm_states import explained, num_jobs_before, state_of, status_of_accounting, status_of_job

JOB = Job("slurm", "17")
STATES = {
    # `man squeue`, JOB STATE CODES, of Slurm 22.05
    "BOOT_FAIL": JobState.FAILED,
    "CANCELLED": JobState.CANCELLED,
    "COMPLETED": JobState.SUCCEEDED,
    "CONFIGURING": JobState.PENDING,
    "COMPLETING": JobState.RUNNING,
    "DEADLINE": JobState.FAILED,
    "FAILED": JobState.FAILED,
    "NODE_FAIL": JobState.FAILED,
    "OUT_OF_MEMORY": JobState.FAILED,
    "PENDING": JobState.PENDING,
    "PREEMPTED": JobState.PREEMPTED,
    "RUNNING": JobState.RUNNING,
    "RESV_DEL_HOLD": JobState.PENDING,
    "REQUEUE_FED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.PENDING,
    "REQUEUED": JobState.PENDING,
    "RESIZING": JobState.RUNNING,
    "REVOKED": JobState.CANCELLED,
    "SIGNALING": JobState.RUNNING,
    "SPECIAL_EXIT": JobState.PENDING,
    "STAGE_OUT": JobState.RUNNING,
    "STOPPED": JobState.RUNNING,
    "SUSPENDED": JobState.RUNNING,
    "TIMEOUT": JobState.PREEMPTED,
    # of newer versions
    "LAUNCH_FAILED": JobState.FAILED,
    "RECONFIG_FAIL": JobState.FAILED,
    "POWER_UP_NODE": JobState.PENDING,  # its nodes are booting, as in CONFIGURING
    "EXPEDITING": JobState.PENDING,  # 25.11: it is put back into the queue, before all others
}
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
NOT_KNOWN = "Slurm has forgotten the job, and its accounting does not know it"


def shown(state: str, reason: str = "None", **others: str) -> str:
    """What `scontrol show job --oneliner` of Slurm 22.05 prints."""
    values = {
        "JobState": state, "Reason": reason, "Dependency": "(null)", "Requeue": "1", "Restarts": "2", "BatchFlag": "1",
        "ExitCode": "0:0", "RunTime": "00:05:00", "TimeLimit": "12:00:00", "StartTime": "Unknown",
        "SuspendTime": "None", "Partition": "gpu", "AllocNode:Sid": "login:5", "ReqNodeList": "(null)",
        "ExcNodeList": "(null)", "NodeList": "gpu[1-2]", "BatchHost": "gpu1", "NumNodes": "2-2",
        "TRES": "cpu=4,mem=8G,node=2", "Command": "/home/u/job.sh", "StdIn": "/dev/null", "Power": "",
    }  # fmt: skip
    fields = " ".join(f"{key}={value}" for key, value in {**values, **others}.items())
    return f"JobId=17 JobName=tiny UserId=u(1000) Priority=42 {fields} \n"


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "state"), STATES.items())
def test_every_state_of_slurm_is_known_everywhere(word: str, state: JobState) -> None:
    assert state_of(word) == state
    assert status_of_job(shown(word)).state == state
    assert status_of_accounting(f"{word}|0:0\n").state == state


def test_every_state_but_submitted_is_one_of_slurms() -> None:
    assert set(STATES.values()) == set(JobState) - {JobState.SUBMITTED, JobState.UNKNOWN}


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("CANCELLED by 1000", JobState.CANCELLED),
        ("CANCELLED+", JobState.CANCELLED),
        ("OUT_OF_ME+", JobState.UNKNOWN),
        ("running", JobState.RUNNING),
        ("ASLEEP", JobState.UNKNOWN),
        ("COMPLETED_NOT", JobState.UNKNOWN),
        ("+", JobState.UNKNOWN),
        (" ", JobState.UNKNOWN),
        ("", JobState.UNKNOWN),
    ],
)
def test_other_words(word: str, state: JobState) -> None:
    assert state_of(word) == state


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (1, JobState.FAILED),
        (2, JobState.FAILED),
        (3, JobState.FAILED),
        (75, JobState.PREEMPTED),
        (130, JobState.CANCELLED),
    ],
)
def test_a_job_that_fails_with_a_code_of_ours_has_ended_as_the_code_says(code: int, state: JobState) -> None:
    by_job = status_of_job(shown("FAILED", "NonZeroExitCode", ExitCode=f"{code}:0"))
    assert by_job == JobStatus(state, "FAILED", f"NonZeroExitCode; exit code {code}")
    by_accounting = status_of_accounting(f"FAILED|{code}:0\n")
    assert by_accounting == JobStatus(state, "FAILED", f"exit code {code}")
    assert state_of("TIMEOUT", code) == JobState.PREEMPTED, "the code is of what was killed"
    assert state_of("CANCELLED", code) == JobState.CANCELLED


@pytest.mark.parametrize(
    ("codes", "end"),
    [
        ("0:9", "ended by signal 9"),
        ("0:15", "ended by signal 15"),
        ("0:53", "it could not be started: can its nodes write to its folder?"),
        ("1:53", "it could not be started: can its nodes write to its folder?"),
        ("0:0", ""),
        ("", ""),
        ("x:y", ""),
    ],
)
def test_a_signal_in_place_of_a_code(codes: str, end: str) -> None:
    assert status_of_job(shown("FAILED", ExitCode=codes)) == JobStatus(JobState.FAILED, "FAILED", end)
    assert status_of_accounting(f"FAILED|{codes}\n") == JobStatus(JobState.FAILED, "FAILED", end)


# --- scontrol --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("None", ""),
        ("Resources", "Resources: it waits for nodes to become free"),
        ("Priority", "Priority: jobs with a higher priority come first"),
        ("JobHeldUser", "JobHeldUser: it is held; scontrol release JOBID lets it go"),
        ("PartitionTimeLimit", "PartitionTimeLimit: it asks for more time than the partition gives; lower slurm.time"),
        ("InvalidQOS", "InvalidQOS"),
        (
            "ReqNodeNotAvail,_UnavailableNodes:gpu[1-3]",
            "ReqNodeNotAvail, UnavailableNodes:gpu[1-3]: nodes that it needs are down, drained or reserved",
        ),
        (
            "launch_failed_requeued_held",
            "launch failed requeued held: it could not be started on its node (a failed prolog?); ask an administrator",
        ),
        (
            "Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions",
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
        ),
    ],
)
def test_what_a_job_waits_for(reason: str, told: str) -> None:
    assert status_of_job(shown("PENDING", reason)) == JobStatus(JobState.PENDING, "PENDING", told)


def test_a_job_that_waits_for_what_never_comes_is_not_said_to_wait_for_a_job() -> None:
    assert explained("Dependency") == "Dependency: another job has to end before"
    assert explained("DependencyNeverSatisfied") != "DependencyNeverSatisfied: another job has to end before"


@pytest.mark.parametrize("begins", ["Unknown", "N/A"])
def test_it_tells_when_a_job_is_expected_to_start_if_slurm_knows(begins: str) -> None:
    assert "expects" not in status_of_job(shown("PENDING", "Resources", StartTime=begins)).reason
    known = status_of_job(shown("PENDING", StartTime="2026-01-31T10:00:00"))
    assert known.reason == "Slurm expects it to start at 2026-01-31T10:00:00"
    both = status_of_job(shown("PENDING", "Resources", StartTime="2026-01-31T10:00:00")).reason
    assert both == f"{explained('Resources')}; {known.reason}"
    assert "expects" not in status_of_job(shown("RUNNING", StartTime="2026-01-31T10:00:00")).reason


def test_a_running_job_tells_for_how_long_and_where() -> None:
    status = status_of_job(shown("RUNNING"))
    assert status == JobStatus(JobState.RUNNING, "RUNNING", "for 00:05:00 of 12:00:00 on gpu[1-2]")
    assert str(status) == "running: for 00:05:00 of 12:00:00 on gpu[1-2]"
    assert str(status_of_job(shown("COMPLETING"))).startswith("running (COMPLETING): for ")


@pytest.mark.parametrize("text", ["", "\n", "No jobs in the system\n", "JobState=", "JobState= Reason=None"])
def test_what_scontrol_never_says_is_unknown(text: str) -> None:
    assert status_of_job(text) == JobStatus(JobState.UNKNOWN)


# --- sacct -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["", "\n", "  \n\n"])
def test_without_accounting_a_job_that_slurm_has_forgotten_is_unknown(kept: str) -> None:
    assert status_of_accounting(kept) == JobStatus(JobState.UNKNOWN, reason=NOT_KNOWN)


@pytest.mark.parametrize(
    ("kept", "status"),
    [
        ("COMPLETED|0:0\n", JobStatus(JobState.SUCCEEDED, "COMPLETED")),
        ("CANCELLED by 1000|0:0\n", JobStatus(JobState.CANCELLED, "CANCELLED")),
        ("TIMEOUT|0:0\n", JobStatus(JobState.PREEMPTED, "TIMEOUT")),
        ("OUT_OF_MEMORY|0:125\n", JobStatus(JobState.FAILED, "OUT_OF_MEMORY", "ended by signal 125")),
        ("RUNNING|0:0\n", JobStatus(JobState.RUNNING, "RUNNING")),
        # put back into the queue: the newest start is the last line
        ("NODE_FAIL|1:0\nREQUEUED|0:0\nCOMPLETED|0:0\n\n", JobStatus(JobState.SUCCEEDED, "COMPLETED")),
        ("COMPLETED|0:0\nFAILED|75:0\n", JobStatus(JobState.PREEMPTED, "FAILED", "exit code 75")),
        ("COMPLETED", JobStatus(JobState.SUCCEEDED, "COMPLETED")),
        ("WHAT|EVER\n", JobStatus(JobState.UNKNOWN, "WHAT")),
    ],
)
def test_what_the_accounting_keeps(kept: str, status: JobStatus) -> None:
    assert status_of_accounting(kept) == status


# --- squeue ----------------------------------------------------------------------------------------------------------

QUEUE = """\
20                              PENDING                         gpu             500
11                              PENDING                         gpu             100
19                              PENDING                         gpu             100
17                              PENDING                         gpu             100
12_3                            PENDING                         gpu             100
12_5                            PENDING                         gpu             100
18_[4-9]                        PENDING                         gpu             100
9                               PENDING                         gpu             0
21                              PENDING                         cpu             900
22                              PENDING                         cpu             100
30                              PENDING                         cpu,gpu         999
"""


@pytest.mark.parametrize(
    ("job_id", "before"),
    [
        ("20", 0),  # the highest priority of its partition
        ("11", 1),
        ("12_3", 2),
        ("12_5", 2),  # of the same array: neither is before the other
        ("17", 4),  # 20 has a higher priority; 11 and two of 12 have the same and came earlier
        ("18_[4-9]", 5),
        ("19", 6),
        ("9", 7),  # held, and so behind all others, though it was there first
        ("21", 0),
        ("22", 1),
        ("30", 0),  # of several partitions
        ("12", None),
        ("1", None),
        ("", None),
    ],
)
def test_how_many_jobs_of_the_partition_come_before(job_id: str, before: int | None) -> None:
    assert num_jobs_before(QUEUE, job_id) == before
    garbage = "slurm: a message\n\n17 PENDING gpu\n17 PENDING gpu high\n17 PENDING gpu 1 2\n 17 PENDING gpu -1\n"
    assert num_jobs_before(garbage + QUEUE + garbage, job_id) == before


def test_a_queue_without_jobs() -> None:
    assert num_jobs_before("", "17") is None
    assert num_jobs_before("\n \nnothing\n", "17") is None
    assert num_jobs_before("_ PENDING gpu 5\n17 PENDING gpu 5\n", "17") == 1, "an id without a number"


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of PATH: no command of Slurm is installed but what a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def fake(folder: Path, name: str, script: str) -> None:
    """A command that writes its arguments to NAME.arguments, and does what `script` says."""
    path = folder / name
    path.write_text(f"""#!/bin/sh\nprintf '%s\\n' "$@" > '{folder / name}.arguments'\n{script}\n""")
    path.chmod(0o755)


def arguments(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.arguments").read_text().splitlines()


def prints(text: str) -> str:
    return f"/bin/cat <<'END'\n{text}\nEND"


def test_a_job_that_slurm_knows_needs_no_accounting(bin_folder: Path) -> None:
    fake(bin_folder, "scontrol", prints(shown("RUNNING")))
    assert SlurmLauncher().status(JOB).state == JobState.RUNNING
    assert arguments(bin_folder, "scontrol") == ["show", "job", "--oneliner", "17"]


def test_times_and_words_are_asked_for_in_one_form(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    fake(bin_folder, "scontrol", 'echo "JobState=PENDING Reason=$LC_ALL StartTime=$SLURM_TIME_FORMAT"')
    fake(bin_folder, "squeue", "exit 1")
    assert SlurmLauncher().status(JOB).reason == "C; Slurm expects it to start at standard"


@pytest.mark.parametrize(
    ("queue", "place"),
    [
        (QUEUE, "4 jobs before it in its partition"),
        ("17 PENDING gpu 5\n", "no jobs before it in its partition"),
        ("17 PENDING gpu 5\n18 PENDING gpu 6\n", "1 job before it in its partition"),
        ("", ""),
    ],
)
def test_a_waiting_job_tells_its_place_in_the_queue(bin_folder: Path, queue: str, place: str) -> None:
    fake(bin_folder, "scontrol", prints(shown("PENDING", "InvalidQOS")))
    fake(bin_folder, "squeue", prints(queue))
    status = SlurmLauncher().status(JOB)
    assert status == JobStatus(JobState.PENDING, "PENDING", "; ".join(filter(None, ("InvalidQOS", place))))
    asked = arguments(bin_folder, "squeue")
    assert "--states=PENDING" in asked and "--Format=JobID:32,State:32,Partition:128,PriorityLong:32" in asked


@pytest.mark.parametrize(
    "script", ["echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "exec /bin/sleep 9", ""]
)
def test_a_waiting_job_waits_also_where_the_queue_does_not_answer(
    bin_folder: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 0.2)
    fake(bin_folder, "scontrol", prints(shown("PENDING", "InvalidQOS")))
    if script:  # else squeue is not installed
        fake(bin_folder, "squeue", script)
    status = SlurmLauncher().status(JOB)
    assert (status.state, status.target_state) == (JobState.PENDING, "PENDING")
    assert status.reason.startswith("InvalidQOS")


def test_the_accounting_knows_what_scontrol_has_forgotten(bin_folder: Path) -> None:
    fake(bin_folder, "scontrol", FORGOTTEN)
    # The steps of a job, which end otherwise than the job, come last, unless they are not wanted.
    steps = 'case "$*" in *--allocations*) ;; *) echo "COMPLETED|0:0" ;; esac'
    fake(bin_folder, "sacct", f'echo "FAILED|75:0"\n{steps}')
    assert SlurmLauncher().status(JOB) == JobStatus(JobState.PREEMPTED, "FAILED", "exit code 75")
    asked = arguments(bin_folder, "sacct")
    assert asked[asked.index("--jobs") + 1] == "17"
    assert {"--noheader", "--parsable2", "--format=State,ExitCode"} <= set(asked)


@pytest.mark.parametrize(
    "script",
    [
        "echo 'Slurm accounting storage is disabled' >&2; exit 1",
        "echo 'COMPLETED|0:0'; echo 'sacct: error: Problem talking to the database' >&2; exit 1",
        "exit 0",
    ],
)
def test_what_nobody_knows_is_unknown(bin_folder: Path, script: str) -> None:
    fake(bin_folder, "scontrol", FORGOTTEN)
    fake(bin_folder, "sacct", script)
    assert SlurmLauncher().status(JOB) == JobStatus(JobState.UNKNOWN, reason=NOT_KNOWN)


def test_a_controller_that_does_not_answer_leaves_the_state_unknown_in_its_words(bin_folder: Path) -> None:
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    fake(bin_folder, "scontrol", f"echo 'scontrol: retrying' >&2; echo '  {words}' >&2; exit 1")
    fake(bin_folder, "sacct", "echo 'COMPLETED|0:0'")
    status = SlurmLauncher().status(JOB)
    assert status == JobStatus(JobState.UNKNOWN, reason=f"Slurm does not answer: scontrol: retrying; {words}")
    assert not (bin_folder / "sacct.arguments").exists(), "the accounting is behind"
    fake(bin_folder, "scontrol", "exit 4")
    assert SlurmLauncher().status(JOB).reason == "Slurm does not answer: exit code 4"


def test_a_command_that_is_not_installed(bin_folder: Path, tmp_path: Path) -> None:
    status = SlurmLauncher().status(JOB)
    assert status.state == JobState.UNKNOWN and "scontrol is not installed here" in status.reason
    assert "login node" in status.reason
    fake(bin_folder, "scontrol", FORGOTTEN)
    status = SlurmLauncher().status(JOB)
    assert status.state == JobState.UNKNOWN and "sacct is not installed here" in status.reason
    with pytest.raises(InputError, match="sbatch is not installed here"):
        SlurmLauncher().submit(Request(("sbatch", "--parsable"), "#!/bin/bash\n"), tmp_path)
    with pytest.raises(InputError, match="scancel is not installed here"):
        SlurmLauncher().cancel(JOB, saves=False)


def test_a_command_that_hangs_is_not_waited_for(
    bin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 0.2)
    for name in ("sacct", "sbatch", "scancel"):
        fake(bin_folder, name, "exec /bin/sleep 9")
    fake(bin_folder, "scontrol", FORGOTTEN)
    assert SlurmLauncher().status(JOB) == JobStatus(JobState.UNKNOWN, reason="sacct has not answered in 0 s")
    fake(bin_folder, "scontrol", "exec /bin/sleep 9")
    assert SlurmLauncher().status(JOB) == JobStatus(JobState.UNKNOWN, reason="scontrol has not answered in 0 s")
    with pytest.raises(InfrastructureError, match="sbatch has not answered"):
        SlurmLauncher().submit(Request(("sbatch",), "#!/bin/bash\n"), tmp_path)
    with pytest.raises(InfrastructureError, match="scancel has not answered"):
        SlurmLauncher().cancel(JOB, saves=False)


def test_a_status_raises_nothing_for_letters_of_another_encoding(bin_folder: Path) -> None:
    """Such as those in the path of a folder, which scontrol prints as they are."""
    fake(bin_folder, "scontrol", r"printf 'JobState=RUNNING Reason=None WorkDir=/home/m\374ller NodeList=gpu1\n'")
    assert SlurmLauncher().status(JOB).state == JobState.RUNNING


@pytest.mark.parametrize(("answer", "job_id"), [("17", "17"), ("17;cluster2", "17")])
def test_the_script_is_sent_from_the_users_folder(bin_folder: Path, tmp_path: Path, answer: str, job_id: str) -> None:
    users = tmp_path / "the user's"
    users.mkdir()
    fake(bin_folder, "sbatch", f"/bin/cat > script; echo a warning >&2; echo '{answer}'")
    script = "#!/bin/bash\n#SBATCH --nodes=2\nexec true é\n"
    assert SlurmLauncher().submit(Request(("sbatch", "--parsable"), script), users) == Job("slurm", job_id)
    assert (users / "script").read_text() == script
    assert arguments(bin_folder, "sbatch") == ["--parsable"]


def test_what_sbatch_refuses_is_said_in_its_words(bin_folder: Path, tmp_path: Path) -> None:
    words = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
    fake(bin_folder, "sbatch", f"echo 'sbatch: error: lua: no account' >&2; echo '{words}' >&2; exit 1")
    with pytest.raises(InputError) as caught:
        SlurmLauncher().submit(Request(("sbatch", "--parsable"), "#!/bin/bash\n"), tmp_path)
    assert str(caught.value) == f"sbatch refuses the job: sbatch: error: lua: no account; {words}"


def test_a_job_is_cancelled_by_its_id(bin_folder: Path) -> None:
    fake(bin_folder, "scancel", "exit 0")
    SlurmLauncher().cancel(JOB, saves=False)
    assert arguments(bin_folder, "scancel") == ["17"]
    fake(bin_folder, "scancel", "echo 'scancel: error: Kill job error on job id 17: Access denied' >&2; exit 1")
    with pytest.raises(InfrastructureError, match=r"^scancel 17: .*Access denied$"):
        SlurmLauncher().cancel(JOB, saves=False)
