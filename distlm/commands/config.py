"""`distlm validate` and `distlm schema`: the config without a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from distlm.config.load import load_config
from distlm.config.reference import config_reference
from distlm.config.resolve import at_world_size, batch_plan, possible_world_sizes
from distlm.config.schema import RunConfig
from distlm.console import say
from distlm.errors import ExitCode
from distlm.launchers.targets import check_for_target


def validate(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides, check_for_target).config
    plans = [batch_plan(at_world_size(config, size)) for size in possible_world_sizes(config)]
    say(
        f"{options.config}: valid. {plans[0].global_batch} samples per step = {plans[0].micro_batch} per forward pass "
        f"x {_either([plan.world_size for plan in plans])} workers x "
        f"{_either([plan.accumulation_steps for plan in plans])} accumulation steps; ZeRO stage "
        f"{config.deepspeed.zero_stage}, {config.training.mixed_precision}"
    )
    return ExitCode.SUCCEEDED


def _either(numbers: Sequence[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


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
