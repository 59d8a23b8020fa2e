"""The learning rate as a function of the step: a schedule of transformers, by its name, with no state to save."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import get_scheduler

from distlm.config.resolve import warmup_steps
from distlm.config.schema import RunConfig
from distlm.errors import InputError, Problem


def learning_rate_schedule(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """Steps count from 1; step s gets what transformers' Trainer gives its s-th optimizer step.

    Raises InputError for arguments that the schedule does not take.
    """
    training = config.training
    _check_decay(config, total_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    try:
        scheduler = get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(config, total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs) or None,
        )
        (factor,) = scheduler.lr_lambdas
        factor(0), factor(total_steps)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            Problem(
                f"{training.lr_scheduler_type}: {error}",
                "training.lr_scheduler_kwargs",
                str(training.lr_scheduler_kwargs),
            )
        ) from None
    return lambda step: training.learning_rate * float(factor(step - 1))


def _check_decay(config: RunConfig, total_steps: int) -> None:
    """transformers takes a decay that does not fit behind the warm-up, and jumps into the middle of it."""
    kwargs, warmup = config.training.lr_scheduler_kwargs, warmup_steps(config, total_steps)
    num_decay_steps = kwargs.get("num_decay_steps", 0)
    if config.training.lr_scheduler_type == "warmup_stable_decay" and warmup + num_decay_steps > total_steps:
        message = (
            f"{num_decay_steps:g} and the {warmup} steps of warm-up are more than the {total_steps} steps of the run"
        )
        raise InputError(Problem(message, "training.lr_scheduler_kwargs.num_decay_steps", f"{num_decay_steps:g}"))
