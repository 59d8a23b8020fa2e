"""`distlm validate` and `distlm schema`: the config without a run."""

from __future__ import annotations

import argparse
import json

from distlm.config.load import load_config
from distlm.config.reference import config_reference
from distlm.config.resolve import batch_plan
from distlm.config.schema import RunConfig
from distlm.console import say
from distlm.errors import ExitCode
from distlm.launchers.local import LocalLauncher


def validate(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides, LocalLauncher().check).config
    plan = batch_plan(config)
    say(
        f"{options.config}: valid. {plan.global_batch} samples per step = {plan.micro_batch} per forward pass x "
        f"{plan.world_size} workers x {plan.accumulation_steps} accumulation steps; ZeRO stage "
        f"{config.deepspeed.zero_stage}, {config.training.mixed_precision}"
    )
    return ExitCode.SUCCEEDED


def schema(options: argparse.Namespace) -> int:
    if options.markdown:
        say(config_reference(), end="")
        return ExitCode.SUCCEEDED
    say(
        json.dumps(
            {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}, indent=2
        )
    )
    return ExitCode.SUCCEEDED
