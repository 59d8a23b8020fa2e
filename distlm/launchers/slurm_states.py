"""What Slurm says about jobs, in distlm's words.

submitted   (nothing yet)
pending     PENDING CONFIGURING EXPEDITING POWER_UP_NODE REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT
running     RUNNING COMPLETING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED
succeeded   COMPLETED
failed      FAILED BOOT_FAIL DEADLINE NODE_FAIL OUT_OF_MEMORY LAUNCH_FAILED RECONFIG_FAIL
cancelled   CANCELLED REVOKED
preempted   PREEMPTED TIMEOUT, and FAILED with exit code 75
unknown     everything else, and jobs that Slurm has forgotten
"""

from __future__ import annotations

import re

from distlm.launchers.base import JobState, JobStatus

_STATES = {
    JobState.PENDING: (
        "PENDING", "CONFIGURING", "EXPEDITING", "POWER_UP_NODE", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD",
        "RESV_DEL_HOLD", "SPECIAL_EXIT",
    ),
    JobState.RUNNING: (
        "RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED",
    ),
    JobState.SUCCEEDED: ("COMPLETED",),
    JobState.FAILED: (
        "FAILED", "BOOT_FAIL", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY", "LAUNCH_FAILED", "RECONFIG_FAIL",
    ),
    JobState.CANCELLED: ("CANCELLED", "REVOKED"),
    JobState.PREEMPTED: ("PREEMPTED", "TIMEOUT"),
}  # fmt: skip
_STATE_OF = {word: state for state, words in _STATES.items() for word in words}

_REASONS = {
    "None": "",
    "AssocGrpCpuLimit": "the account uses all the CPUs that it may",
    "AssocGrpGRES": "the account uses all the GPUs that it may",
    "AssocMaxJobsLimit": "the account runs as many jobs as it may",
    "BeginTime": "it may not begin yet; a job that was put back into the queue waits for up to two minutes",
    "Cleaning": "what is left of its last start is being ended",
    "DependencyNeverSatisfied": "the job that it waits for has failed; it will never begin",
    "Dependency": "another job has to end before",
    "JobHeldAdmin": "an administrator holds it; ask them",
    "JobHeldUser": "it is held; scontrol release JOBID lets it go",
    "launch failed requeued held": "it could not be started on its node (a failed prolog?); ask an administrator",
    "NodeDown": "a node that it needs is down",
    "PartitionDown": "the partition is down",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives; lower slurm.nodes",
    "PartitionTimeLimit": "it asks for more time than the partition gives; lower slurm.time",
    "Priority": "jobs with a higher priority come first",
    "QOSMaxCpuPerUserLimit": "you use all the CPUs that the QOS gives you",
    "QOSMaxGRESPerUser": "you use all the GPUs that the QOS gives you",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS gives you",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "Resources": "it waits for nodes to become free",
}
"""What Slurm's reasons mean, by their first words, where these do not say it themselves."""


def state_of(word: str, exit_code: int | None = None) -> JobState:
    """Of Slurm's word, such as RUNNING or "CANCELLED by 1000"."""
    words = word.split()
    state = _STATE_OF.get(words[0].rstrip("+").upper(), JobState.UNKNOWN) if words else JobState.UNKNOWN
    return state.with_exit_code(exit_code)


def status_of_job(shown: str) -> JobStatus:
    """From one line of `scontrol show job --oneliner`."""
    values: dict[str, str] = {}
    for name, value in re.findall(r"(?:^|\s)(\w+)=(\S*)", shown):
        values.setdefault(name, value)  # a comment, or the name of a folder, may look the same
    word, (code, signal_number) = values.get("JobState", ""), _exit_code(values.get("ExitCode", ""))
    state = state_of(word, code)
    reason = explained(values.get("Reason", "None").replace("_", " "))
    if state == JobState.PENDING:
        begins = values.get("StartTime", "Unknown")
        expected = f"Slurm expects it to start at {begins}" if begins not in ("Unknown", "N/A") else ""
        reason = "; ".join(filter(None, (reason, expected)))
    elif state == JobState.RUNNING:
        reason = f"for {values.get('RunTime', '?')} of {values.get('TimeLimit', '?')} on {values.get('NodeList', '?')}"
    elif not state.is_alive:
        reason = _end(reason, code, signal_number)
    return JobStatus(state, word, reason)


def status_of_accounting(kept: str) -> JobStatus:
    """From the output of `sacct --parsable2 --format=State,ExitCode`; empty where there is no accounting."""
    for line in reversed(kept.splitlines()):
        word, _, codes = line.partition("|")
        if word.strip():
            code, signal_number = _exit_code(codes)
            return JobStatus(state_of(word, code), word.split()[0], _end("", code, signal_number))
    return JobStatus(JobState.UNKNOWN, reason="Slurm has forgotten the job, and its accounting does not know it")


def explained(reason: str) -> str:
    """Slurm's reason, and what it means."""
    meaning = next((text for word, text in _REASONS.items() if reason.startswith(word)), None)
    if meaning is None:
        return reason
    return f"{reason}: {meaning}" if meaning else ""


def num_jobs_before(queue: str, job_id: str) -> int | None:
    """How many waiting jobs of the same partition are before it, from `squeue --Format` with JobID, State, Partition
    and PriorityLong; None: it is not there. Held jobs have priority 0."""
    rows = [line.split() for line in queue.splitlines()]
    jobs = [(row[0], row[2], int(row[3])) for row in rows if len(row) == 4 and row[3].isdecimal()]
    for identifier, partition, priority in jobs:
        if identifier == job_id:
            others = [other for other in jobs if other[1] == partition and other[0] != job_id]
            return sum(1 for other in others if (-other[2], _number(other[0])) < (-priority, _number(job_id)))
    return None


def _number(job_id: str) -> int:
    return int(re.split(r"\D", job_id, maxsplit=1)[0] or 0)


def _exit_code(text: str) -> tuple[int | None, int | None]:
    """Of "CODE:SIGNAL"."""
    code, _, signal_number = text.partition(":")
    return (
        int(code) if code.isdecimal() else None,
        int(signal_number) if signal_number.isdecimal() and int(signal_number) else None,
    )


def _end(reason: str, code: int | None, signal_number: int | None) -> str:
    """How a job has ended."""
    parts = [reason]
    if signal_number == _CANNOT_START:
        parts.append("it could not be started: can its nodes write to its folder?")
    elif signal_number:
        parts.append(f"ended by signal {signal_number}")
    elif code:
        parts.append(f"exit code {code}")
    return "; ".join(filter(None, parts))


_CANNOT_START = 53
"""What Slurm says in place of a signal where it could not open the job's output."""
