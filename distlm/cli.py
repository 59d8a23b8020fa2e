"""The `distlm` command: thin verbs over the config, the run folder and the launchers.

Nothing heavy is imported before a verb is known: `distlm --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from distlm import __version__
from distlm.console import exit_code_of

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
    submit.add_argument(
        "config",
        type=Path,
        metavar="CONFIG|run:RUN",
        help="YAML file; or run:RUN, for a new run equal to RUN: its id (or its beginning), folder, or 'last'",
    )
    submit.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where RUN is (default: runs)")
    submit.add_argument("--dry-run", action="store_true", help="print the resolved config and the command, do nothing")
    submit.set_defaults(verb=_later("submit", "submit"))

    resume = verbs.add_parser("resume", help="continue a run from its last good checkpoint")
    resume.add_argument("run", help="id (or its beginning), folder, or 'last'")
    resume.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    resume.set_defaults(verb=_later("submit", "resume"))
    for verb in (submit, resume):
        verb.add_argument(
            "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as training.max_steps=1000"
        )
        verb.add_argument("--detach", action="store_true", help="return at once, the run goes on in the background")

    validate = verbs.add_parser("validate", help="check a config and its local files, listing all problems")
    validate.add_argument("config", type=Path, help="YAML file")
    validate.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    validate.set_defaults(verb=_later("config", "validate"))

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
    verify.set_defaults(verb=_later("verify_resume", "verify_resume"))

    schema = verbs.add_parser("schema", help="print the JSON Schema of the config, for editors")
    schema.set_defaults(verb=_later("config", "schema"))

    ui = verbs.add_parser("ui", help="open the MLflow UI on the embedded store")
    ui.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    ui.add_argument("--port", type=int, default=5000)
    ui.add_argument("--host", default="127.0.0.1")
    ui.set_defaults(verb=_later("tracking", "ui"))

    sync = verbs.add_parser("sync", help="send to MLflow what it has not had yet of a run")
    sync.add_argument("run", help="id (or its beginning), folder, or 'last'")
    sync.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    sync.set_defaults(verb=_later("tracking", "sync"))

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
    checkpoints.set_defaults(verb=_later("checkpoints", "checkpoints"))

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
    export.set_defaults(verb=_later("checkpoints", "export"))
    return parser


def _later(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """The function of a verb, whose module is imported when it is called."""

    def verb(options: argparse.Namespace) -> int:
        function: Callable[[argparse.Namespace], int] = getattr(import_module(f"distlm.commands.{module}"), name)
        return function(options)

    return verb


def _sizes(text: str) -> list[int]:
    """The numbers of "2,1,3". Raises ArgumentTypeError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 2,2,1") from None


if __name__ == "__main__":
    sys.exit(main())
