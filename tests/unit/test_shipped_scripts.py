"""The scripts in slurm/ are what `distlm render` prints for the shipped configs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from distlm.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["pretrain", "finetune-lora"])
def test_it_is_rendered(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["render", f"configs/{name}.yaml", "--target", "slurm"]) == 0
    shipped = ROOT / "slurm" / f"{name}.sbatch"
    assert shipped.read_text() == capsys.readouterr().out
    subprocess.run(("bash", "-n", str(shipped)), check=True)


def test_no_other_script_is_shipped() -> None:
    assert sorted(path.name for path in (ROOT / "slurm").iterdir()) == ["finetune-lora.sbatch", "pretrain.sbatch"]
