"""The process in which verbs go on that need torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODULE = "import os\ndef main(arguments):\n    print(os.environ['OMP_WAIT_POLICY'], arguments)\n    return 7\n"


def test_threads_sleep_while_they_wait_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "verb.py").write_text(MODULE)
    environ = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for given, expected in ({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"):
        done = subprocess.run(
            [sys.executable, "-m", "distlm.commands.data_plane", "verb", "--a", "b c"],
            env={**environ, **given, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (7, f"{expected} {['--a', 'b c']}\n"), done.stderr
