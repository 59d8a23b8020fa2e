"""The fp32 weights and Adam moments that a rank holds in a DeepSpeed engine, as live views, and how to refill them.

The only file that leans on DeepSpeed's private names. Checked against 0.19.8:

    stage 0     engine.optimizer is the plain AdamW; every rank holds everything
    stage 1, 2  DeepSpeedZeroOptimizer: `bit16_groups`, `single_partition_of_fp32_groups`, `param._hp_mapping`
                (this rank's fragment of the parameter and where it lies in the group's flat fp32 partition),
                `update_lp_params`, `_hp_optimizer_states_linked`, `_lazy_init_hp_params_optimizer_state`
    stage 3     DeepSpeedZeroOptimizer_Stage3: `fp16_groups`, `fp32_partitioned_groups_flat`,
                `fp16_partitioned_groups_flat`, `grad_position`, `get_param_id`, `_get_param_partition_rank`,
                `_partition_all_parameters`, `_unflatten_partitioned_parameters`, `persistent_parameters`

A name that is missing raises CheckpointError: nothing is skipped, so nothing is silently saved less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from distlm.errors import CheckpointError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CHECKED_DEEPSPEED_VERSION = "0.19.8"
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
PARTITIONED_STAGE_3 = "fp32_partitioned_groups_flat"
PARTITIONED_STAGE_1_2 = "single_partition_of_fp32_groups"


@dataclass(frozen=True)
class HeldFragment:
    """Elements start.. of a flattened parameter that this rank holds. `tensors`: kind -> flat fp32 live view."""

    name: str
    start: int
    tensors: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.tensors["weight"].numel()


def _internal(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        import deepspeed

        raise CheckpointError(
            f"{type(owner).__name__} of DeepSpeed {deepspeed.__version__} has no {name}; checkpoints were checked"
            f" with {CHECKED_DEEPSPEED_VERSION}, so install that version"
        ) from None


def actual_zero_stage(engine: DeepSpeedEngine) -> int:
    """The stage of the optimizer that really runs, whatever the config says; -1 for a kind that is not known here."""
    optimizer = engine.optimizer
    if hasattr(optimizer, PARTITIONED_STAGE_3):
        return 3
    if hasattr(optimizer, PARTITIONED_STAGE_1_2):
        return 2 if _internal(optimizer, "partition_gradients") else 1
    return 0 if isinstance(optimizer, torch.optim.Optimizer) else -1


def flat_weights(engine: DeepSpeedEngine) -> list[Tensor]:
    """The fp32 tensors that Adam steps on this rank: flat partitions, padding included; at stage 0 the parameters."""
    match actual_zero_stage(engine):
        case 0:
            return [p for group in engine.optimizer.param_groups for p in group["params"]]
        case 1 | 2:
            return list(_internal(engine.optimizer, PARTITIONED_STAGE_1_2))
        case 3:
            return list(_internal(engine.optimizer, PARTITIONED_STAGE_3))
    raise CheckpointError(f"{type(engine.optimizer).__name__} is an optimizer whose state distlm cannot read")


def trainable_shapes(engine: DeepSpeedEngine) -> dict[str, list[int]]:
    """Full shape of each trainable parameter by name."""
    named = engine.module.named_parameters()
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}


def fragments(engine: DeepSpeedEngine) -> Iterator[HeldFragment]:
    """What this rank holds. At stage 0 that is every parameter whole, on each rank."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    stage = actual_zero_stage(engine)
    zero = engine.optimizer
    if stage == 0:
        for parameter in flat_weights(engine):
            yield HeldFragment(names[id(parameter)], 0, {k: t.view(-1) for k, t in _tensors(engine, parameter).items()})
        return
    groups = _internal(zero, "fp16_groups" if stage == 3 else "bit16_groups")
    for parameters, flat in zip(groups, flat_weights(engine), strict=True):
        tensors = _tensors(engine, flat)
        for parameter in parameters:
            start, offset, numel = _address_stage_3(zero, parameter) if stage == 3 else _address_stage_1_2(parameter)
            if numel > 0:
                views = {kind: tensor.narrow(0, offset, numel) for kind, tensor in tensors.items()}
                yield HeldFragment(names[id(parameter)], start, views)


def full_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The fp32 weight of every trainable parameter, whole, on every rank: for what is small, such as an adapter.
    Collective."""
    shapes = trainable_shapes(engine)
    weights = {name: torch.zeros(math.prod(shape), device=engine.device) for name, shape in shapes.items()}
    for fragment in fragments(engine):
        weights[fragment.name][fragment.start : fragment.start + fragment.numel] = fragment.tensors["weight"]
    if actual_zero_stage(engine) != 0:  # each element is held by one rank
        for weight in weights.values():
            dist.all_reduce(weight)
    return {name: weight.view(shapes[name]) for name, weight in weights.items()}


def _address_stage_1_2(parameter: Tensor) -> tuple[int, int, int]:
    """(start within the parameter, offset within the flat partition, numel) of what this rank holds."""
    mapping = _internal(parameter, "_hp_mapping")
    if mapping is None:
        return 0, 0, 0
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return low.start, high.start, high.numel


def _address_stage_3(zero: Any, parameter: Any) -> tuple[int, int, int]:
    """As `_address_stage_1_2`; the last rank's part is shorter by the padding, or empty."""
    parameter_id = _internal(zero, "get_param_id")(parameter)
    _, offset, partition_numel = _internal(zero, "grad_position")[parameter_id]
    start = partition_numel * _internal(zero, "_get_param_partition_rank")(parameter)
    return start, offset, max(0, min(partition_numel, _internal(parameter, "ds_numel") - start))


def _adam_states(engine: DeepSpeedEngine) -> dict[Tensor, dict[str, Any]]:
    optimizer = engine.optimizer
    return optimizer.state if actual_zero_stage(engine) == 0 else _internal(optimizer, "optimizer").state


def _tensors(engine: DeepSpeedEngine, flat: Tensor) -> dict[str, Tensor]:
    """Weight and moments. Before the first step Adam has none yet: then zeros, which is what it starts from."""
    state = _adam_states(engine).get(flat) or {}
    weight = flat.detach()
    if weight.dtype != torch.float32:
        raise CheckpointError(f"the optimizer steps on {weight.dtype} weights; a checkpoint holds fp32")
    moments = {kind: state[kind] if kind in state else torch.zeros_like(weight) for kind in ("exp_avg", "exp_avg_sq")}
    return {"weight": weight, **moments}


def adam_step(engine: DeepSpeedEngine) -> int:
    """Adam's own step count, from which its bias correction follows; 0 before the first step."""
    states = _adam_states(engine)
    steps = {int(states[flat]["step"]) if states.get(flat) else 0 for flat in flat_weights(engine)}
    if len(steps) > 1:
        raise CheckpointError(f"the parameters are at different Adam steps: {sorted(steps)}")
    return steps.pop() if steps else 0


def start_adam(engine: DeepSpeedEngine, step: int) -> None:
    """Give every weight Adam state at `step`, to be filled through `fragments`."""
    states = _adam_states(engine)
    for flat in flat_weights(engine):
        moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
        states[flat] = {"step": torch.tensor(float(step), device=flat.device), **moments}
    if actual_zero_stage(engine) in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        _internal(engine.optimizer, "_lazy_init_hp_params_optimizer_state")()


def publish_weights(engine: DeepSpeedEngine) -> None:
    """After the fp32 weights were changed through `fragments`: bring them into the model. Collective."""
    zero = engine.optimizer
    match actual_zero_stage(engine):
        case 1 | 2:
            _internal(zero, "update_lp_params")()
        case 3:
            _internal(zero, "_partition_all_parameters")()
            flats = zip(_internal(zero, "fp16_partitioned_groups_flat"), flat_weights(engine), strict=True)
            for index, (model_flat, fp32_flat) in enumerate(flats):
                model_flat.data.copy_(fp32_flat.data)
                _internal(zero, "_unflatten_partitioned_parameters")(index)
            # Small parameters stay gathered between steps, so they hold the weights from before.
            if persistent := _internal(zero, "persistent_parameters"):
                persistent[0].all_gather(persistent)


def hyper_parameters(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """Per parameter group, what JSON can hold of its settings."""
    plain = (int, float, bool, str, tuple, list, type(None))
    groups = engine.optimizer.param_groups
    return [{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)} for group in groups]


def loss_scaler_state(engine: DeepSpeedEngine) -> dict[str, Any] | None:
    """The dynamic loss scaler of fp16; None in fp32 and bf16, which have none."""
    if not engine.fp16_enabled():
        return None
    scaler = _internal(engine.optimizer, "loss_scaler")
    return {name: _internal(scaler, name) for name in LOSS_SCALER_FIELDS}


def set_loss_scaler_state(engine: DeepSpeedEngine, state: dict[str, Any] | None) -> None:
    if engine.fp16_enabled() and state is not None:
        for name in LOSS_SCALER_FIELDS:
            setattr(_internal(engine.optimizer, "loss_scaler"), name, state[name])
