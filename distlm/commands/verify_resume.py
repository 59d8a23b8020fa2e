"""`distlm verify-resume`: whether a run of a config resumes exactly."""

from __future__ import annotations

import argparse

from distlm.verify_resume import command


def verify_resume(options: argparse.Namespace) -> int:
    return command.verify_resume(options.config, options.overrides, options.steps, options.workers, options.keep)
