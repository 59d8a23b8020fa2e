"""The control plane starts without torch, ray or mlflow, and does not import the data plane."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {config: {model_type: bert}}
tokenizer: {train: {vocab_size: 1000}}
data: {train: [{source: python-docs}]}
training: {max_steps: 10}
"""
HEAVY = {"torch", "ray", "mlflow", "deepspeed", "accelerate", "transformers", "numpy", "pyarrow", "datasets", "peft"}
HEAVY |= {"kubernetes", "urllib3"}
CONTROL_PLANE = [
    "causes.py", "cli.py", "commands", "completion.py", "console.py", "devices.py", "doctor", "errors.py",
    "job_run.py", "leftovers.py", "metrics_file.py", "mlflow_store.py", "outcome.py", "processes.py", "ray_job.py",
    "ray_settings.py", "redact.py", "retry_policy.py", "run_folder.py", "run_status.py", "stop_count.py",
    "table_arguments.py", "temporary.py",
    "checkpoint", "config", "kubernetes", "launchers", "slurm", "verify_resume", "view",
    "data/sources.py", "data/rows.py", "data/readers.py", "data/tables.py", "data/lines.py", "data/python_docs.py",
]  # fmt: skip
DATA_PLANE = (
    "distlm.controller",
    "distlm.worker",
    "distlm.tasks",
    "distlm.tracking",
    "distlm.inference",
    "distlm.data",
)


def loaded_modules(*arguments: str) -> set[str]:
    """Top-level modules that a distlm command has imported when it ends."""
    code = (
        "import sys, runpy, io, contextlib\n"
        "out = io.StringIO()\n"
        "try:\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        from distlm.cli import main; code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "assert not code, (code, out.getvalue())\n"
        "print(' '.join(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_help_imports_neither_the_schema_nor_anything_heavy() -> None:
    modules = loaded_modules("--help")
    assert not modules & (HEAVY | {"pydantic", "yaml"})


@pytest.mark.parametrize("verb", ["validate", "submit --dry-run"])
def test_validate_and_dry_run_import_nothing_heavy(verb: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG)
    modules = loaded_modules(*verb.split(), str(config))
    assert "pydantic" in modules
    assert not modules & HEAVY


def test_schema_imports_nothing_heavy() -> None:
    assert not loaded_modules("schema") & HEAVY


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports at its top level (imports inside functions are late on purpose)."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def control_plane_files() -> list[Path]:
    entries = [ROOT / "distlm" / name for name in CONTROL_PLANE]
    return [file for entry in entries for file in ([entry] if entry.suffix else sorted(entry.glob("*.py")))]


@pytest.mark.parametrize("path", control_plane_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_control_plane_does_not_import_the_data_plane(path: Path) -> None:
    # What `validate` checks of local files: standard library only.
    names = ("sources", "rows", "readers", "tables", "lines", "python_docs")
    allowed = tuple(f"distlm.data.{name}" for name in names)
    crossing = {name for name in imports_of(path) if name.startswith(DATA_PLANE) and not name.startswith(allowed)}
    assert not crossing - {"distlm.data"}
    assert not {name.partition(".")[0] for name in imports_of(path)} & HEAVY


def test_workers_never_import_mlflow() -> None:
    for folder in ("worker", "tasks", "data", "inference"):
        for path in (ROOT / "distlm" / folder).glob("*.py"):
            assert not any(name.startswith("mlflow") for name in imports_of(path)), path


def test_processes_that_tokenize_load_little() -> None:
    code = "import sys, distlm.data.parallel; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(run.stdout.split())
    assert "tokenizers" in loaded
    assert not loaded & {"transformers", "torch", "ray", "datasets", "pydantic", "pandas"}
