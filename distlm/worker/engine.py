"""Accelerate and DeepSpeed, set up the same way on CPU and on GPU, for ZeRO stages 0 to 3.

    accelerator = make_accelerator(settings)          # joins the process group, before any model is loaded
    model = ...from_pretrained(path)                  # under stage 3 this loads each rank's part only
    optimizer = build_optimizer(parameter_groups(model, weight_decay), ...)
    engine = prepare(accelerator, model, optimizer)
    for each step: set_learning_rate(engine, lr); forward and backward(accelerator, loss, is_last=...) per micro batch

**Precision.** `bf16` means fp32 parameters under torch autocast (DeepSpeed's `torch_autocast`) at every stage. The
parameters, the gradients, their sum over micro batches and their reduction over ranks are fp32; the matrix products are
bf16 (on a CPU without bf16 instructions see `cpu_bf16`). So the stages compute the same numbers up to the order of a
sum, and a checkpoint goes from one to another. DeepSpeed's own bf16 mode is not used: at stage 0 it accumulates
gradients in bf16, and at stage 1 it is another optimizer than at stages 2 and 3. `fp16` needs a loss scale, which
DeepSpeed's autocast applies after clipping in ZeRO stages; it is therefore DeepSpeed's fp16 mode at stages 1 to 3, on
GPU only.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from distlm.devices import garbage_collector_at_rest
from distlm.errors import InfrastructureError, InputError, Problem
from distlm.worker.cpu_bf16 import use_fp32_kernels_for_bf16
from distlm.worker.shared_memory import SharedMemory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from deepspeed import DeepSpeedEngine

MixedPrecision = Literal["no", "fp16", "bf16"]
OffloadDevice = Literal["none", "cpu"]

REDUCE_BUCKET_NUMEL = 50_000_000
"""Elements that ZeRO reduces or gathers in one go: 200 MB of fp32. DeepSpeed's default of 5e8 holds 2 GB on a GPU."""

_BUCKET_MULTIPLE = 1024
_NORM_NUMEL = 2**18  # elements of a gradient whose norm is taken in one go

NO_CLIPPING_NORM = 1e30
"""Given to DeepSpeed at stage 0 in place of 0, because with 0 it never computes the gradient norm there."""


@dataclass(frozen=True)
class EngineSettings:
    """What decides how DeepSpeed trains; everything else about training is outside of it.

    `max_grad_norm` is the global L2 norm that gradients are clipped to; 0 clips nothing. `micro_batch_size` is in
    samples per worker. The offload devices move optimizer state (stages 1 to 3) and parameters (stage 3) to the host.
    `num_parameters` of the model, where known, keeps the buffers of a small model small.
    """

    zero_stage: int
    mixed_precision: MixedPrecision = "no"
    gradient_accumulation_steps: int = 1
    micro_batch_size: int = 1
    max_grad_norm: float = 1.0
    offload_optimizer_device: OffloadDevice = "none"
    offload_param_device: OffloadDevice = "none"
    device: Literal["cpu", "cuda"] = "cpu"
    num_parameters: int = REDUCE_BUCKET_NUMEL


def check_settings(settings: EngineSettings) -> None:
    """Raise InputError naming every combination that DeepSpeed would refuse, or silently train as something else."""
    problems = []
    if settings.zero_stage not in (0, 1, 2, 3):
        problems.append(Problem("must be 0, 1, 2 or 3", "zero_stage", str(settings.zero_stage)))
    if settings.mixed_precision == "fp16" and (settings.device == "cpu" or settings.zero_stage == 0):
        message = "needs a GPU and zero_stage 1, 2 or 3; use bf16, which works everywhere"
        problems.append(Problem(message, "mixed_precision", "fp16"))
    if settings.offload_optimizer_device != "none" and settings.zero_stage == 0:
        message = "needs zero_stage 1, 2 or 3: at stage 0 the optimizer state stays on the device"
        problems.append(Problem(message, "offload_optimizer_device", settings.offload_optimizer_device))
    if settings.offload_param_device != "none" and settings.zero_stage != 3:
        message = f"needs zero_stage 3, not {settings.zero_stage}: only stage 3 shards the parameters"
        problems.append(Problem(message, "offload_param_device", settings.offload_param_device))
    if problems:
        raise InputError(*problems)


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """The DeepSpeed dictionary, with nothing left to 'auto'. Pure, and printable as JSON.

    Gradients are accumulated and reduced in fp32 whatever the precision: `lower_precision_safe_modules` is empty
    because modules listed there are reduced, and gathered at stage 3, in bf16.

    Raises:
        InputError: the settings do not fit together.
    """
    check_settings(settings)
    stage = settings.zero_stage
    # Allocated in full, whatever the model's size. DeepSpeed wants a multiple of 2 and of the workers, so of any power.
    bucket_numel = min(REDUCE_BUCKET_NUMEL, -(-settings.num_parameters // _BUCKET_MULTIPLE) * _BUCKET_MULTIPLE)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket_numel,
        "allgather_bucket_size": bucket_numel,
        "overlap_comm": stage == 3,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
        # With True it is an all-reduce as well, of a copy of the bucket (DeepSpeed 0.19.8).
        "reduce_scatter": False,
        "offload_optimizer": {"device": settings.offload_optimizer_device},
        "offload_param": {"device": settings.offload_param_device},
    }
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": settings.max_grad_norm or (NO_CLIPPING_NORM if stage == 0 else 0.0),
        "zero_optimization": zero,
        # torch's own AdamW in every case: with True, offloading would compile and swap in DeepSpeedCPUAdam.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "fp16": {"enabled": settings.mixed_precision == "fp16", "loss_scale": 0.0, "initial_scale_power": 16},
        "bf16": {"enabled": False},
        "torch_autocast": {
            "enabled": settings.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "wall_clock_breakdown": False,
    }


def make_accelerator(settings: EngineSettings) -> Accelerator:
    """Join the process group (or reuse the one that exists) and return the Accelerator of DeepSpeed's kind.

    Needs RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment. Call it before a model is
    loaded: from then on, at stage 3, `from_pretrained` partitions the model while it reads the file.

    Raises:
        InputError: the settings do not fit together.
        InfrastructureError: the ranks cannot reach each other.
    """
    config = deepspeed_config(settings)
    if settings.device == "cpu" and settings.mixed_precision == "bf16":
        use_fp32_kernels_for_bf16()
    _prepare_deepspeed_import(settings)
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    # On a CPU machine, Accelerate without a named backend believes it is alone, and with cpu=True it drops DeepSpeed.
    backend = InitProcessGroupKwargs(backend="nccl" if settings.device == "cuda" else "gloo")
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    try:
        return Accelerator(
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            mixed_precision="no",
            kwargs_handlers=[backend],
        )
    except dist.DistNetworkError as error:
        raise InfrastructureError(f"the workers cannot meet at rank 0: {error}") from error


def _prepare_deepspeed_import(settings: EngineSettings) -> None:
    if settings.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    # DeepSpeed's autotuner imports mlflow (2 s) if it can; None makes that an ImportError. Workers never need mlflow.
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    # DeepSpeed 0.19.8 calls names that torch 2.13 renamed, several times per layer and step at stage 3.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with garbage_collector_at_rest():
        import deepspeed.ops

    # Compiled for 40 to 60 s at first use, for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with and those without weight decay.

    No decay on biases and norms: everything inside a norm module and everything of fewer than 2 dimensions. Works on
    parameters that ZeRO-3 has already partitioned, whose own shape is (0,). Parameters keep the model's order, and an
    empty group is left out.
    """
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    in_norms = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = id(parameter) in in_norms or len(full_shape(parameter)) < 2
            (undecayed if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter before ZeRO-3 partitioned it (its `ds_shape`), or simply its shape."""
    return getattr(parameter, "ds_shape", parameter.shape)


def build_optimizer(
    groups: Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with the Hugging Face names and defaults."""
    # Fused: one pass over the weights and moments instead of about ten, on CPU and on GPU.
    return torch.optim.AdamW(
        list(groups), lr=learning_rate, betas=(adam_beta1, adam_beta2), eps=adam_epsilon, fused=True
    )


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> DeepSpeedEngine:
    """Hand model and optimizer to DeepSpeed; collective. Train through the returned engine and `accelerator`.

    Raises:
        InputError: the model cannot be trained at this ZeRO stage.
    """
    if accelerator.state.deepspeed_plugin.zero_stage == 3:
        _refuse_empty_parameters(model)
    if dist.get_backend() == "gloo":
        _communicate_in_place()
    engine, _ = accelerator.prepare(model, optimizer)
    if engine.zero_optimization_stage() == 0:
        _watch_grad_norm(engine)
    elif engine.zero_optimization_stage() in (1, 2):
        _take_norms_piecewise(engine.optimizer)
    return engine


def _refuse_empty_parameters(model: nn.Module) -> None:
    """DeepSpeed 0.19.8 never gathers a parameter without elements, and fails in the first forward pass.

    MobileBERT has one where its embedding_size is its hidden_size.
    """
    for name, parameter in model.named_parameters():
        if full_shape(parameter).numel() == 0:
            message = f"the parameter {name} of the model has no elements, which stage 3 cannot train; use 0, 1 or 2"
            raise InputError(Problem(message, "deepspeed.zero_stage", "3"))


def _communicate_in_place() -> None:
    """Have DeepSpeed sum gradients, and gather the weights after a step of ZeRO 1 and 2, without gloo's detours.

    On one host that is memory which the workers share. gloo's all-gather (torch 2.13) makes two copies of all weights,
    in three times the time of sending the parts to where they belong.
    """
    from deepspeed import comm
    from deepspeed.runtime.zero import stage_1_and_2

    shared = SharedMemory.join()
    gloo_all_reduce = getattr(comm.all_reduce, "__wrapped__", comm.all_reduce)  # of an engine before this one

    @wraps(gloo_all_reduce)
    def all_reduce(
        tensor: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
        **others: Any,
    ) -> Any:
        if shared and op == dist.ReduceOp.SUM and _is_world(group) and not async_op and shared.takes(tensor):
            return shared.all_reduce(tensor)
        return gloo_all_reduce(tensor, op, group, async_op, **others)

    def all_gather_dp_groups(
        groups_flat: Sequence[torch.Tensor],
        partitioned_param_groups: Sequence[Sequence[torch.Tensor]],
        dp_process_group: Sequence[dist.ProcessGroup],
        **_: Any,
    ) -> None:
        for partitions, group in zip(partitioned_param_groups, dp_process_group, strict=True):
            if shared and _is_world(group) and shared.takes(partitions[0]):
                shared.all_gather(partitions)
            else:
                _exchange(partitions, group)

    comm.all_reduce = all_reduce
    stage_1_and_2.all_gather_dp_groups = all_gather_dp_groups


def _is_world(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == dist.get_world_size()


def _exchange(parts: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Fill the parts of the other ranks with what they have in theirs."""
    rank = dist.get_rank(group)
    others = [other for other in range(len(parts)) if other != rank]
    transfers = [dist.irecv(parts[other], group=group, group_src=other) for other in others]
    transfers += [dist.isend(parts[rank], group=group, group_dst=other) for other in others]
    for transfer in transfers:
        assert transfer is not None, "this worker is in the group"
        transfer.wait()


def _take_norms_piecewise(optimizer: Any) -> None:
    """Of gradients at ZeRO 1 and 2: DeepSpeed 0.19.8 copies each to double precision for it, which is large in one."""
    norm_of_whole_tensors = optimizer.get_grad_norm_direct

    def norm(gradients: Iterable[torch.Tensor], parameters: Iterable[nn.Parameter], norm_type: int = 2) -> torch.Tensor:
        real = (g for g in gradients if not getattr(g, "_zero_padding", False))
        pieces = [(piece, p) for g, p in zip(real, parameters, strict=False) for piece in g.view(-1).split(_NORM_NUMEL)]
        norm_of_all: torch.Tensor = norm_of_whole_tensors([g for g, _ in pieces], [p for _, p in pieces], norm_type)
        return norm_of_all

    optimizer.get_grad_norm_direct = norm


def _watch_grad_norm(engine: DeepSpeedEngine) -> None:
    """Make stage 0 do as the others: keep the norm, and skip the update if it is not finite.

    DeepSpeed 0.19.8 clips there in `clip_fp32_gradients`, throws the norm away and steps whatever it was.
    """

    def clip_and_record() -> None:
        parameters = [p for p in engine.module.parameters() if p.requires_grad]
        engine._global_grad_norm = nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())
        if not torch.isfinite(engine._global_grad_norm):
            engine.zero_grad()  # sets the gradients to None, and Adam passes over parameters without one

    engine.clip_fp32_gradients = clip_and_record


def backward(accelerator: Accelerator, loss: torch.Tensor, *, is_last: bool) -> None:
    """Add the gradient of a micro batch to those of its step, and update the weights after the last one; collective.

    How many micro batches a step has may differ from step to step, but not between the workers. DeepSpeed divides each
    loss by the accumulation steps of the settings whatever that number is, and averages over the workers. ZeRO 2 and 3
    reduce the gradient of every micro batch, 0 and 1 that of the step.
    """
    # What `accelerator.accumulate` sets by counting. The rest that it does, DeepSpeed's no_sync at stages 0 and 1, only
    # spares a reduction that DeepSpeed leaves out by itself before the last micro batch.
    accelerator.sync_gradients = is_last
    accelerator.backward(loss)


def global_grad_norm(engine: DeepSpeedEngine) -> float:
    """L2 norm of the last step's gradient over all ranks, before clipping.

    Infinite or NaN if the gradient was not finite; the update was then skipped, on every rank and at every stage.
    """
    return float(engine.get_global_grad_norm())


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Set the learning rate of every parameter group for the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
