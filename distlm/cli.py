# PYTHON_ARGCOMPLETE_OK
"""The `distlm` command: thin verbs over the config, the run folder and the launchers.

Nothing heavy is imported before a verb is known: `distlm --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from distlm import __version__
from distlm.console import exit_code_of
from distlm.errors import ExitCode
from distlm.redact import redact_uri
from distlm.table_arguments import add_table_arguments

_EPILOG = """examples:
  distlm validate configs/pretrain.yaml     every problem of it, with its line
  distlm submit configs/pretrain.yaml       train, and show how it goes
  distlm resume last                        continue the newest run

distlm VERB --help has more. Every key of the config: distlm schema --markdown

exit codes: 0 succeeded; 1 failed, would fail again; 2 bad input;
3 infrastructure failed; 75 preempted, continue with resume; 130 cancelled"""

_EXAMPLES = {
    "submit": """
  distlm submit configs/pretrain.yaml
  distlm submit configs/pretrain.yaml training.max_steps=1000 seed=7
  distlm submit configs/pretrain.yaml --dry-run
  distlm submit configs/pretrain.yaml --target slurm slurm.nodes=2
  distlm submit configs/pretrain.yaml --target ray --address http://head:8265
  distlm submit run:last

Ctrl-C finishes the step, saves a checkpoint and says how to resume; a second
one stops now. SIGTERM and SIGUSR2 do what one Ctrl-C does, with exit code 75.""",
    "render": """
  distlm render configs/pretrain.yaml --target slurm > pretrain.sbatch""",
    "logs": """
  distlm logs last -f
  distlm logs 20260131-23 --rank 1""",
    "resume": """
  distlm resume last
  distlm resume last --target slurm
  distlm resume 20260131-23 training.max_steps=20000
  distlm resume last resources.num_workers=4 deepspeed.zero_stage=3""",
    "cancel": """
  distlm cancel last
  distlm cancel 20260131-23 --checkpoint""",
    "validate": """
  distlm validate configs/pretrain.yaml
  distlm validate configs/pretrain.yaml 'data.train.0.paths=["corpus/*.txt"]'""",
    "verify-resume": """
  distlm verify-resume configs/pretrain.yaml
  distlm verify-resume configs/pretrain.yaml --workers 2,2,1 --steps 20""",
    "schema": """
  distlm schema > config.schema.json
  distlm schema --markdown | less""",
    "list": """
  distlm list
  distlm list -n 0 --json""",
    "status": """
  distlm status last
  distlm status 20260131-23 --json""",
    "ui": """
  distlm ui
  distlm ui last --open
  distlm ui --runs-dir elsewhere/runs --port 5001""",
    "doctor": """
  distlm doctor""",
    "completion": """
  distlm completion bash""",
    "sync": """
  distlm sync last""",
    "checkpoints": """
  distlm checkpoints last
  distlm checkpoints last --verify""",
    "export": """
  distlm export last my-model
  distlm export last my-model --step best
  distlm export last my-model --merge""",
    "predict": """
  distlm predict last reviews.csv --out predicted.csv
  distlm predict last texts.jsonl --out labels.parquet --step best --workers 4""",
    "evaluate": """
  distlm evaluate last test.csv
  distlm evaluate last test.conll --step best --out scores""",
}

_TARGETS = ("local", "ray", "slurm", "kubernetes")

_CHECKPOINTS_EPILOG = """states:
  committed    whole: the manifest is good, the files are there in its sizes;
               their bytes were not read
  verified     with --verify: every byte has its hash
  damaged      never restored, and why; a resume uses the newest one that is
               not damaged
  unknown      of a format version that this distlm does not read; a resume
               refuses to go on without it
  unfinished   being written or deleted, or left so by a killed process; the
               next attempt clears it away

exit codes: 0 none is damaged or unknown (or there are none); 2 bad input;
3 some are"""

_CANCEL_EPILOG = """exit codes: 0 it has ended as asked, had ended before, or succeeded meanwhile;
2 bad input; 3 it has not ended within the time, or it is lost; else that of
its end, for example because it could not save"""

_COMPLETION_EPILOG = """to have it in every new shell:
  bash   echo 'eval "$(distlm completion bash)"' >> ~/.bashrc
  zsh    echo 'eval "$(distlm completion zsh)"' >> ~/.zshrc
  fish   distlm completion fish > ~/.config/fish/completions/distlm.fish"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; errors made on purpose end as text on stderr, without a traceback."""
    options = _parse(arguments)
    return exit_code_of(lambda: options.verb(options))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; overrides may stand anywhere, of which argparse alone takes those before the first option only."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        from distlm.completion import complete

        complete(parser)
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        parser.exit(ExitCode.BAD_INPUT)
    options, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        advice = "; overrides have no dashes: key.sub=value" if any("=" in item for item in unknown) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


class _Parser(argparse.ArgumentParser):
    """Says what it refuses without secrets."""

    def error(self, message: str) -> NoReturn:
        super().error(redact_uri(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="distlm",
        description="One YAML file describes a training run; distlm trains it.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distlm {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    submit = verbs.add_parser(
        "submit",
        help="train a run from its config",
        description="Train a run from its config: on this machine, on the Ray cluster that RAY_ADDRESS names, or by "
        "--target elsewhere. Everything that it leaves is in runs/RUN_ID. A run elsewhere is followed until it ends; "
        "Ctrl-C then leaves it alone.",
    )
    submit.add_argument(
        "config",
        type=Path,
        metavar="CONFIG|run:RUN",
        help="YAML file; or run:RUN, for a new run equal to RUN: its id (or its beginning), folder, or 'last'",
    )
    submit.add_argument("--runs-dir", type=Path, help="where RUN is (default: runs)")
    submit.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and what would be sent, do nothing"
    )
    submit.set_defaults(verb=_later("submit", "submit"))

    render = verbs.add_parser(
        "render",
        help="print what a target is sent for a config",
        description="Print what a target is sent for a new run of a config, for the target's own commands. Does "
        "nothing.",
    )
    render.add_argument("config", type=Path, help="YAML file")
    _add_overrides(render)
    render.set_defaults(verb=_later("submit", "render"))

    resume = verbs.add_parser(
        "resume",
        help="continue a run from its last good checkpoint",
        description="Continue a run from its last good checkpoint. Workers, ZeRO stage, max_steps and what is about "
        "saving, evaluation and logging may change; what would train something else is refused.",
    )
    _add_run(resume)
    _add_runs_dir(resume)
    resume.set_defaults(verb=_later("submit", "resume"))
    for verb in (submit, resume, render):
        verb.add_argument("--target", choices=_TARGETS, help="where to run (default: resources.target, which is local)")
        verb.add_argument("--address", metavar="URL", help="of the cluster's Jobs API, for the target ray: ray.address")
    for verb in (submit, resume):
        _add_overrides(verb)
        verb.add_argument("--detach", action="store_true", help="return at once, the run goes on")
        verb.add_argument("--json", action="store_true", help="print events for programs, one line of JSON each")

    logs = verbs.add_parser(
        "logs",
        help="print the log of a run, or follow it",
        description="Print what the newest attempt of a run has shown, from any machine that sees the run's folder. "
        "With -f, follow the run through its attempts until it has ended, and exit with its code.",
    )
    _add_run(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    logs.add_argument("--rank", type=_count, metavar="N", help="what the worker of that rank has printed instead")
    logs.add_argument("--attempt", type=_positive, metavar="N", help="of that attempt (default: the newest)")
    _add_runs_dir(logs)
    logs.set_defaults(verb=_later("follow", "logs"))

    cancel = verbs.add_parser(
        "cancel",
        help="end a running run, with --checkpoint saved",
        description="End a run from any terminal or host that sees its folder, and wait until it has ended. Without "
        "--checkpoint it ends at once, cancelled (130), and what is newer than its last checkpoint is lost.",
        epilog=_CANCEL_EPILOG,
    )
    _add_run(cancel)
    cancel.add_argument(
        "--checkpoint", action="store_true", help="finish the step and save; the run ends preempted (75)"
    )
    cancel.add_argument(
        "--timeout", type=_count, default=120, metavar="SECONDS",
        help="how long to wait for the end; the request stands in any case (default: 120)",
    )  # fmt: skip
    cancel.add_argument("--json", action="store_true", help="print an object for programs")
    _add_runs_dir(cancel)
    cancel.set_defaults(verb=_later("cancel", "cancel"))

    validate = verbs.add_parser(
        "validate",
        help="list every problem of a config and its local files",
        description="Check a config and its local files, and list every problem with its line. Starts nothing.",
    )
    validate.add_argument("config", type=Path, help="YAML file")
    _add_overrides(validate)
    validate.set_defaults(verb=_later("config", "validate"))

    verify = verbs.add_parser(
        "verify-resume",
        help="try whether a run of this config resumes exactly",
        description="Train a few steps of this config straight, and again in pieces, with workers killed and their "
        "number changed, and compare samples, losses and weights.",
    )
    verify.add_argument("config", type=Path, help="YAML file")
    _add_overrides(verify)
    verify.add_argument("--steps", type=int, default=12, help="steps to train (default: 12)")
    verify.add_argument(
        "--workers", type=_sizes, metavar="N,N,...",
        help="workers of each piece (default: those of the config twice, then another number)",
    )  # fmt: skip
    verify.add_argument("--keep", action="store_true", help="keep the runs, also if all is well")
    verify.set_defaults(verb=_later("verify_resume", "verify_resume"))

    schema = verbs.add_parser(
        "schema",
        help="print every key of the config, for editors and people",
        description="Print every key of the config with its type, default and meaning, as JSON Schema for editors.",
    )
    schema.add_argument(
        "--markdown", action="store_true", help="print them as a page for people instead: docs/config.md"
    )
    schema.set_defaults(verb=_later("config", "schema"))

    listing = verbs.add_parser("list", help="list the runs, newest first, with state, step and loss")
    listing.add_argument("-n", "--limit", type=_count, default=20, metavar="N", help="how many; 0: all (default: 20)")
    listing.set_defaults(verb=_later("runs", "list_runs"))

    status = verbs.add_parser("status", help="show one run: state, metrics, attempts, checkpoints, where things are")
    _add_run(status)
    status.set_defaults(verb=_later("runs", "status"))

    ui = verbs.add_parser(
        "ui",
        help="open the MLflow UI, at a run if one is named",
        description="Without RUN: start the MLflow UI on the embedded store of the runs folder. With RUN: print the "
        "address of the run's page on its tracking server, or start the UI on the store that it is recorded in.",
    )
    ui.add_argument("run", nargs="?", help="id (or its beginning), folder, or 'last'")
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default: 5000)")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    ui.add_argument("--open", action="store_true", help="open the page in the default browser")
    ui.set_defaults(verb=_later("ui", "ui"))

    doctor = verbs.add_parser("doctor", help="check what this machine has and lacks for training")
    doctor.set_defaults(verb=_later("doctor", "doctor"))
    for verb, what in (
        (listing, "print an array"), (status, "print an object"), (ui, "print the address in a line of JSON"),
        (doctor, "print an array"),
    ):  # fmt: skip
        verb.add_argument("--json", action="store_true", help=f"{what}, for programs")
        _add_runs_dir(verb)

    sync = verbs.add_parser(
        "sync",
        help="send to MLflow what it missed of a run",
        description="Send to MLflow what it has not had yet of a run, for example because its server was down: "
        "metrics, logs and the model. Sending twice adds nothing twice.",
    )
    _add_run(sync)
    _add_runs_dir(sync)
    sync.set_defaults(verb=_later("tracking", "sync"))

    checkpoints = verbs.add_parser(
        "checkpoints",
        help="list the checkpoints of a run",
        description="List the checkpoints of a run, newest first.",
        epilog=_CHECKPOINTS_EPILOG,
    )
    _add_run(checkpoints)
    checkpoints.add_argument("--verify", action="store_true", help="read every byte and compare it with its hash")
    checkpoints.add_argument("--json", action="store_true", help="print a list for programs")
    _add_runs_dir(checkpoints)
    checkpoints.set_defaults(verb=_later("checkpoints", "checkpoints"))

    export = verbs.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face folder",
        description="Write the weights of a checkpoint (fp32), its config, tokenizer and model card into a new folder "
        "that from_pretrained loads. Needs a few hundred MB of memory, whatever the size of the model; of an adapter, "
        "as much as the model.",
    )
    _add_run(export)
    export.add_argument("dir", type=Path, metavar="DIR", help="folder to make; must not exist, or be empty")
    _add_step(export)
    export.add_argument(
        "--merge", action="store_true", help="of an adapter: write the model with the adapter merged into it"
    )
    _add_runs_dir(export)
    export.set_defaults(verb=_later("checkpoints", "export"))

    predict = verbs.add_parser(
        "predict",
        help="label every row of a file with a run's model",
        description="Predict with a run's model for every row of INPUT and write FILE: all columns of the input, in "
        "its order, and label and score, or labels and scores, or prediction, or the labels of the words. A call "
        "after a kill goes on where it was: docs/predict.md.",
    )
    _add_run(predict)
    predict.add_argument("input", type=Path, metavar="INPUT", help="file: .csv .tsv .jsonl .parquet .txt .conll")
    predict.add_argument(
        "--out", type=Path, required=True, metavar="FILE",
        help="file to make: .csv .tsv .jsonl .parquet, for words also .conll",
    )  # fmt: skip
    _add_step(predict)
    predict.add_argument(
        "--workers", type=_positive, default=1, metavar="N", help="processes that predict, through Ray (default: 1)"
    )

    evaluate = verbs.add_parser(
        "evaluate",
        help="score a run's model on other labelled data",
        description="Compute the metrics of the run's task, and its tables, on other labelled data.",
    )
    _add_run(evaluate)
    evaluate.add_argument(
        "data", type=Path, nargs="+", metavar="DATA", help="file, or several, with labels; COLUMN=FILE: parallel files"
    )
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="folder for the tables: scores of each label, ...")
    _add_step(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print an object for programs")
    for verb, name in ((predict, "predict"), (evaluate, "evaluate")):
        verb.add_argument(
            "--batch-size", type=_positive, metavar="N",
            help="samples of a batch (default: training.per_device_eval_batch_size)",
        )  # fmt: skip
        _add_runs_dir(verb)
        add_table_arguments(verb, with_labels=verb is evaluate)
        verb.set_defaults(verb=_later("inference", name))

    completion = verbs.add_parser(
        "completion",
        help="print what makes a shell complete verbs, runs and config keys",
        description="Print the completion script of a shell.",
        epilog=_COMPLETION_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(verb=_later("completion", "completion"))
    for name, examples in _EXAMPLES.items():
        verb = verbs.choices[name]
        verb.formatter_class = _HelpFormatter
        verb.epilog = "\n\n".join(filter(None, [f"examples:{examples}", verb.epilog]))
    return parser


def _add_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", help="id (or its beginning), folder, or 'last'")


def _add_step(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--step",
        metavar="N|best|last",
        help="which checkpoint: a step; the best by training.metric_for_best_model; the last good one (default: what "
        "the run's own model is made of: best with training.load_best_model_at_end, else last)",
    )


def _add_runs_dir(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are (default: runs)")


def _add_overrides(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as training.max_steps=1000")


class _HelpFormatter(argparse.HelpFormatter):
    """What has lines of its own keeps them, and no verb is so long that what it does begins on the next line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = len("    verify-resume")  # argparse forgets that verbs are indented

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _later(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """The function of a verb, whose module is imported when it is called."""

    def verb(options: argparse.Namespace) -> int:
        function: Callable[[argparse.Namespace], int] = getattr(import_module(f"distlm.commands.{module}"), name)
        return function(options)

    return verb


def _count(text: str) -> int:
    """A number of things. Raises ArgumentTypeError."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number that is 0 or more")
    return int(text)


def _positive(text: str) -> int:
    """A number of things, at least one. Raises ArgumentTypeError."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number that is 1 or more")
    return int(text)


def _sizes(text: str) -> list[int]:
    """The numbers of "2,1,3". Raises ArgumentTypeError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 2,2,1") from None


if __name__ == "__main__":
    sys.exit(main())
