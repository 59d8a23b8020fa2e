"""The `distlm` command: thin verbs over the config, the run folder and the launchers.

Nothing heavy is imported before a verb is known: `distlm --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distlm import __version__
from distlm.console import exit_code_of, say
from distlm.errors import ExitCode, InputError

if TYPE_CHECKING:
    from distlm.run_folder import RunFolder

_EPILOG = """exit codes: 0 succeeded; 1 failed, would fail again; 2 bad input; 3 infrastructure failed;
75 preempted, continue with resume; 130 cancelled"""

_CHECKPOINTS_EPILOG = """states:
  committed    whole: the manifest is good, the files are there in its sizes; their bytes were not read
  verified     with --verify: every byte has its hash
  damaged      never restored, and why; a resume uses the newest one that is not damaged
  unknown      of a format version that this distlm does not read; a resume refuses to go on without it
  unfinished   being written or deleted, or left so by a killed process; the next attempt clears it away

exit codes: 0 none is damaged or unknown (or there are none); 2 bad input; 3 some are"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; errors made on purpose end as text on stderr, without a traceback."""
    options = _parse(arguments)
    return exit_code_of(lambda: options.verb(options))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; overrides may stand anywhere, of which argparse alone takes those before the first option only."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        advice = "; overrides have no dashes: key.sub=value" if any("=" in item for item in unknown) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distlm",
        description="One YAML file describes a training run; distlm trains it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distlm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    submit = verbs.add_parser("submit", help="train a run from its config")
    submit.add_argument("config", type=Path, help="YAML file")
    submit.add_argument("--dry-run", action="store_true", help="print the resolved config and the command, do nothing")
    submit.set_defaults(verb=_submit)

    resume = verbs.add_parser("resume", help="continue a run from its last good checkpoint")
    resume.add_argument("run", help="id (or its beginning), folder, or 'last'")
    resume.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    resume.set_defaults(verb=_resume)
    for verb in (submit, resume):
        verb.add_argument(
            "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as training.max_steps=1000"
        )
        verb.add_argument("--detach", action="store_true", help="return at once, the run goes on in the background")

    validate = verbs.add_parser("validate", help="check a config and its local files, listing all problems")
    validate.add_argument("config", type=Path, help="YAML file")
    validate.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    validate.set_defaults(verb=_validate)

    verify = verbs.add_parser(
        "verify-resume", help="check on a few steps that a run of this config resumes exactly, killed and resized"
    )
    verify.add_argument("config", type=Path, help="YAML file")
    verify.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    verify.add_argument("--steps", type=int, default=12, help="steps to train (default: 12)")
    verify.add_argument(
        "--workers", type=_sizes, metavar="N,N,...",
        help="workers of each piece (default: those of the config twice, then another number)",
    )  # fmt: skip
    verify.add_argument("--keep", action="store_true", help="keep the runs, also if all is well")
    verify.set_defaults(verb=_verify_resume)

    schema = verbs.add_parser("schema", help="print the JSON Schema of the config, for editors")
    schema.set_defaults(verb=_schema)

    ui = verbs.add_parser("ui", help="open the MLflow UI on the embedded store")
    ui.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    ui.add_argument("--port", type=int, default=5000)
    ui.add_argument("--host", default="127.0.0.1")
    ui.set_defaults(verb=_ui)

    sync = verbs.add_parser("sync", help="send to MLflow what it has not had yet of a run")
    sync.add_argument("run", help="id (or its beginning), folder, or 'last'")
    sync.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    sync.set_defaults(verb=_sync)

    checkpoints = verbs.add_parser(
        "checkpoints",
        help="list the checkpoints of a run",
        description="List the checkpoints of a run, newest first.",
        epilog=_CHECKPOINTS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checkpoints.add_argument("run", help="id (or its beginning), folder, or 'last'")
    checkpoints.add_argument("--verify", action="store_true", help="read every byte and compare it with its hash")
    checkpoints.add_argument("--json", action="store_true", help="print a list for programs")
    checkpoints.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    checkpoints.set_defaults(verb=_checkpoints)

    export = verbs.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face folder, on this machine alone",
        description="Write the weights of a checkpoint (fp32), its config, tokenizer and model card into a new folder "
        "that from_pretrained loads. Needs a few hundred MB of memory, whatever the size of the model.",
    )
    export.add_argument("run", help="id (or its beginning), folder, or 'last'")
    export.add_argument("dir", type=Path, metavar="DIR", help="folder to make; must not exist, or be empty")
    export.add_argument(
        "--step",
        default="last",
        metavar="N|best|last",
        help="which checkpoint: a step; the best by training.metric_for_best_model; the last good one (default)",
    )
    export.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    export.set_defaults(verb=_export)
    return parser


def _submit(options: argparse.Namespace) -> int:
    from distlm.config.attempt import begin_attempt, create_run
    from distlm.config.load import load_config
    from distlm.launchers.local import LocalLauncher
    from distlm.run_folder import RunFolder, new_run_id

    launcher = LocalLauncher()
    loaded = load_config(options.config, options.overrides, launcher.check)
    run = RunFolder(Path(loaded.config.runs_dir).absolute() / new_run_id())
    request = launcher.build(loaded.config, run)
    if options.dry_run:
        import yaml

        from distlm.config.resolve import resolved_tree

        say(yaml.safe_dump(resolved_tree(loaded.config, loaded.raw), sort_keys=False), end="")
        say(f"# {request}")
        return ExitCode.SUCCEEDED
    create_run(loaded, run)
    attempt = begin_attempt(loaded, run, options.overrides)
    say(f"run {run.run_id} in {os.path.relpath(run.path)}")
    code = launcher.submit(request, attempt, options.detach)
    return _report(run, code) if not options.detach else code


def _resume(options: argparse.Namespace) -> int:
    from distlm.config.attempt import begin_attempt, changed_config
    from distlm.launchers.local import LocalLauncher
    from distlm.run_folder import lease

    run = find_run(options.runs_dir, options.run)
    last = _last_result(run)
    if last and last["exit_code"] == ExitCode.SUCCEEDED and not options.overrides:
        say(f"run {run.run_id} has succeeded; nothing to do")
        return ExitCode.SUCCEEDED
    launcher = LocalLauncher()
    loaded, changes = changed_config(run, options.overrides, launcher.check)
    with lease(run):  # refused here already, before an attempt is made, if the run is being trained
        attempt = begin_attempt(loaded, run, options.overrides, changes=changes)
    say(f"run {run.run_id}, attempt {attempt.number}")
    code = launcher.submit(launcher.build(loaded.config, run), attempt, options.detach)
    return _report(run, code) if not options.detach else code


def _last_result(run: RunFolder) -> dict[str, object] | None:
    from distlm.run_folder import read_json

    attempts = run.attempts()
    result: dict[str, object] | None = read_json(attempts[-1].result_json) if attempts else None
    return result


def _report(run: RunFolder, code: int) -> int:
    """Say how the attempt ended, from its result.json."""
    from distlm.errors import Problem
    from distlm.run_folder import read_json

    result = read_json(run.attempts()[-1].result_json)
    where = os.path.relpath
    if code == ExitCode.SUCCEEDED:
        say(f"succeeded: model in {where(run.model)}; curves: distlm ui --runs-dir {where(run.runs_dir)}")
        return code
    if result["problems"]:
        for problem in result["problems"]:
            say(f"distlm: {Problem.from_json(problem)}", file=sys.stderr)
        return code
    place = f" on rank {result['rank']}" if result.get("rank") is not None else ""
    place += f" ({result['host']})" if result.get("host") else ""
    say(f"distlm: {result['state']}{place}: {result['message']}", file=sys.stderr)
    say(f"distlm: log: {where(result['log'])}", file=sys.stderr)
    if any(run.checkpoints.glob("step-*")):
        say(f"distlm: continue with: distlm resume {run.run_id}", file=sys.stderr)
    return code


def find_run(runs_dir: Path, name: str) -> RunFolder:
    """The run named by its id, a beginning of it, its folder, or 'last'. Raises InputError unless it is exactly one."""
    from distlm.run_folder import RunFolder

    if (Path(name) / "run.yaml").is_file() and (Path(name) / "attempts").is_dir():
        return RunFolder(Path(name).absolute())
    known = sorted(path.parent for path in runs_dir.absolute().glob("*/run.yaml"))
    found = known[-1:] if name == "last" else [path for path in known if path.name.startswith(name)]
    if len(found) == 1:
        return RunFolder(found[0])
    if not found:
        newest = ", ".join(path.name for path in known[-5:]) or "none"
        raise InputError(
            f"there is no run {name} in {runs_dir} (newest runs: {newest}); use --runs-dir for another folder"
        )
    raise InputError(f"{name} is the beginning of {len(found)} runs: {', '.join(path.name for path in found[:5])}")


def _validate(options: argparse.Namespace) -> int:
    from distlm.config.load import load_config
    from distlm.config.resolve import batch_plan
    from distlm.launchers.local import LocalLauncher

    config = load_config(options.config, options.overrides, LocalLauncher().check).config
    plan = batch_plan(config)
    say(
        f"{options.config}: valid. {plan.global_batch} samples per step = {plan.micro_batch} per forward pass x "
        f"{plan.world_size} workers x {plan.accumulation_steps} accumulation steps; ZeRO stage "
        f"{config.deepspeed.zero_stage}, {config.training.mixed_precision}"
    )
    return ExitCode.SUCCEEDED


def _sizes(text: str) -> list[int]:
    """The numbers of "2,1,3". Raises ArgumentTypeError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 2,2,1") from None


def _verify_resume(options: argparse.Namespace) -> int:
    from distlm.verify_resume.command import verify_resume

    return verify_resume(options.config, options.overrides, options.steps, options.workers, options.keep)


def _schema(options: argparse.Namespace) -> int:
    import json

    from distlm.config.schema import RunConfig

    say(
        json.dumps(
            {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}, indent=2
        )
    )
    return ExitCode.SUCCEEDED


def _ui(options: argparse.Namespace) -> int:
    from importlib.util import find_spec

    store = (options.runs_dir / "mlflow.db").absolute()
    if not store.is_file():
        raise InputError(
            f"there is no embedded MLflow store in {options.runs_dir}; use --runs-dir, or open the server that "
            "the run's tracking URI names"
        )
    if find_spec("mlflow") is None:
        raise InputError("the MLflow UI needs mlflow: pip install 'distlm[train]'")
    say(f"MLflow UI on http://{options.host}:{options.port} (Ctrl-C ends it)")
    # Job execution starts 8 more processes of 250 MB each, which nothing here uses.
    os.environ.update(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{store}",
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--workers",
        "1",
    ]
    os.execv(sys.executable, command)


def _sync(options: argparse.Namespace) -> int:
    import subprocess

    run = find_run(options.runs_dir, options.run)
    return subprocess.call([sys.executable, "-m", "distlm.tracking.sync", str(run.path)])


def _checkpoints(options: argparse.Namespace) -> int:
    import json

    from distlm.checkpoint.listing import best_by, list_checkpoints, table
    from distlm.checkpoint.store import CheckpointStore
    from distlm.checkpoint.tensor_file import one_line

    run = find_run(options.runs_dir, options.run)
    try:
        best = best_by(run)
    except InputError as error:
        say(f"distlm: warning: which one is best is not known: {one_line(error)}", file=sys.stderr)
        best = None
    listed = list_checkpoints(CheckpointStore(run.checkpoints), best, verify=options.verify)
    if options.json:
        say(json.dumps([one.to_json() for one in listed], indent=2))
    elif listed:
        say("\n".join(table(listed, best)))
    else:
        say(f"run {run.run_id} has no checkpoints")
    return ExitCode.INFRASTRUCTURE if any(one.state in ("damaged", "unknown") for one in listed) else ExitCode.SUCCEEDED


def _export(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    # In place of this process, so that signals and the exit code need no passing on; this one has no torch.
    command = [sys.executable, "-m", "distlm.worker.export", f"--step={options.step}", "--", run.path, options.dir]
    os.execv(sys.executable, [str(part) for part in command])


if __name__ == "__main__":
    sys.exit(main())
