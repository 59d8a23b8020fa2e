"""How an attempt ended, on one screen: the first failure in one line, what merely followed from it, what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from distlm.errors import Cause, ExitCode, Problem
from distlm.run_folder import RunFolder

_MAX_CHARACTERS, _MAX_FOLLOWER_CHARACTERS = 400, 120
"""Of what a library says."""
_WORDS = {ExitCode.PREEMPTED: "preempted", ExitCode.CANCELLED: "cancelled"}


def ending(run: RunFolder, result: Mapping[str, Any]) -> list[str]:
    """The lines for people; of a failure, the first one has its rank, host, cause, the key to change and the log."""
    code = ExitCode(result["exit_code"])
    if code == ExitCode.SUCCEEDED:
        return [f"succeeded: model in {os.path.relpath(run.model)}; curves: {command(run, 'ui')}"]
    if result["problems"]:
        return [str(Problem.from_json(problem)) for problem in result["problems"]]
    if code in _WORDS:
        return [f"{_WORDS[code]}: {result['message']}", f"resume with: {command(run, 'resume')}"]
    return [_first_line(result), *(f"  {line}" for line in (*_followers(result), _next(run, result)))]


def command(run: RunFolder, verb: str, *arguments: str) -> str:
    """The distlm command that does something to a run, as typed in the current folder."""
    name = run.run_id if run.runs_dir == Path("runs").absolute() else os.path.relpath(run.path)
    return shlex.join(("distlm", verb, f"run:{name}" if verb == "submit" else name, *arguments))


def _first_line(result: Mapping[str, Any]) -> str:
    text = _cut(result["message"], _MAX_CHARACTERS)
    if result.get("place"):
        text += f" ({result['place']})"
    parts = [f"failed{_where(result)}: {result.get('cause') or 'infrastructure'}: {text}"]
    if result.get("advice"):
        parts.append(result["advice"])
    return "; ".join((*parts, f"log: {os.path.relpath(result['log'])}"))


def _where(result: Mapping[str, Any]) -> str:
    if result.get("rank") is None:
        return ""
    followers = result.get("followers") or []
    if followers and all(follower["is_same"] for follower in followers):
        return f" on all {len(followers) + 1} ranks alike"
    return f" on rank {result['rank']}" + (f" ({result['host']})" if result.get("host") else "")


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


def _next(run: RunFolder, result: Mapping[str, Any]) -> str:
    """The command to go on with. What would fail again is to be mended first."""
    if result["exit_code"] != ExitCode.FAILED:
        return f"resume with: {command(run, 'resume')}"
    if result.get("cause") == Cause.DIVERGENCE:
        return f"start anew with other values: {command(run, 'submit')}"
    if result.get("cause") == Cause.OUT_OF_MEMORY:
        anew, resumed = command(run, "submit", "KEY=VALUE"), command(run, "resume", "KEY=VALUE")
        return f"start anew: {anew}; or resume with more sharding or workers: {resumed}"
    return f"when that is mended, resume with: {command(run, 'resume')}"
