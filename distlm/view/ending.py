"""How an attempt ended, on one screen: the first failure in one line, what merely followed from it, what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from distlm.config.resolve import MAY_CHANGE_ON_RESUME
from distlm.console import shown_path
from distlm.errors import Cause, ExitCode, Problem
from distlm.outcome import on_rank
from distlm.run_folder import RunFolder

_MAX_CHARACTERS, _MAX_FOLLOWER_CHARACTERS = 400, 120
"""Of what a library says."""
_WORDS = {ExitCode.PREEMPTED: "preempted", ExitCode.CANCELLED: "cancelled"}


def ending(run: RunFolder, result: Mapping[str, Any], curves: str = "") -> list[str]:
    """The lines for people; of a failure, the first one has its rank, host, cause, the key to change and the log.
    `curves`: where they are; empty: nowhere but in the run's folder."""
    if result["exit_code"] == ExitCode.SUCCEEDED:
        return [f"succeeded: model in {shown_path(run.model)}{f'; curves: {curves}' if curves else ''}"]
    if result["problems"]:
        return what_happened(result)
    then = "; ".join(f"{what_for}: {what}" for what_for, what in next_steps(run, result))
    return [*what_happened(result), then if result["exit_code"] in _WORDS else f"  {then}"]


def what_happened(result: Mapping[str, Any]) -> list[str]:
    """The lines about an attempt that did not succeed, without what to do next. Raises KeyError, TypeError, ValueError
    or AttributeError for a damaged result."""
    code = ExitCode(result["exit_code"])
    if result["problems"]:
        return [str(Problem.from_json(problem)) for problem in result["problems"]]
    if code in _WORDS:
        return [f"{_WORDS[code]}: {result['message']}"]
    return [_first_line(result), *(f"  {line}" for line in _followers(result))]


def next_steps(run: RunFolder, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What one may want to do after an attempt, and the command for it, the likeliest first."""
    resume, resume_otherwise = command(run, "resume"), command(run, "resume", "KEY=VALUE")
    anew = command(run, "submit", "KEY=VALUE")
    match result.get("exit_code"), result.get("cause"):
        case ExitCode.SUCCEEDED, _:
            return [("export", command(run, "export", "DIR"))]
        case ExitCode.BAD_INPUT, _:
            keys = [problem["key"] for problem in result.get("problems") or [] if problem["key"]]
            if not keys:
                return [("when that is mended, resume with", resume)]
            if all(key.startswith(MAY_CHANGE_ON_RESUME) for key in keys):
                return [("resume with what is right", resume_otherwise)]
            return [("start anew with what is right", anew)]
        case ExitCode.FAILED, Cause.DIVERGENCE:
            return [("start anew with other values", anew)]
        case ExitCode.FAILED, Cause.OUT_OF_MEMORY:
            return [("start anew", anew), ("or resume with more sharding or workers", resume_otherwise)]
        case ExitCode.FAILED, _:
            return [("when that is mended, resume with", resume)]
    return [("resume with", resume)]


def command(run: RunFolder, verb: str, *arguments: str) -> str:
    """The distlm command that does something to a run, as typed in the current folder."""
    name = run.run_id if run.runs_dir == Path("runs").absolute() else os.path.relpath(run.path)
    return shlex.join(("distlm", verb, f"run:{name}" if verb == "submit" else name, *arguments))


def _first_line(result: Mapping[str, Any]) -> str:
    text = result["message"]
    if len(text) > _MAX_CHARACTERS:  # what to do stands at the end
        text = f"{text[: _MAX_CHARACTERS // 2]} ... {text[-_MAX_CHARACTERS // 2 :]}"
    if result.get("place"):
        text += f" ({result['place']})"
    parts = [f"failed{_where(result)}: {result.get('cause') or 'infrastructure'}: {text}"]
    if result.get("advice"):
        parts.append(result["advice"])
    return "; ".join((*parts, f"log: {shown_path(result['log'])}"))


def _where(result: Mapping[str, Any]) -> str:
    followers = result.get("followers") or []
    if result.get("rank") is not None and followers and all(follower["is_same"] for follower in followers):
        return f" on all {len(followers) + 1} ranks alike"
    return on_rank(result.get("rank"), result.get("host"))


def _followers(result: Mapping[str, Any]) -> Iterator[str]:
    """One line for all ranks that say the same."""
    followers = [follower for follower in result.get("followers") or [] if not follower["is_same"]]
    followers.sort(key=lambda follower: follower["message"])
    for message, alike in groupby(followers, key=lambda follower: follower["message"]):
        ranks = sorted(follower["rank"] for follower in alike)
        yield f"rank{'s' * (len(ranks) > 1)} {_ranges(ranks)} only followed: {_cut(message, _MAX_FOLLOWER_CHARACTERS)}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 2, 3, 4] -> "0, 2-4"."""
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(parts)
