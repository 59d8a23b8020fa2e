"""The training loop of one worker. It reads as the algorithm; what a step needs is built in the other files here.

Everything random is a function of (seed, step, micro batch) or (seed, pass, sample index), so that a run can stop at
any step and go on, on the same or on another number of workers, as if it had never stopped.

Samples of step s (from 1): global positions (s - 1) * global_batch ... s * global_batch - 1, which `data.batches` cuts
into micro batches; worker r of W takes the micro batches m = r, r + W, r + 2 W, ...
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from distlm.checkpoint.manifest import Progress
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.config.metrics import METRICS
from distlm.config.resolve import batch_plan, has_adapter, problem_kind, profiled_steps
from distlm.config.schema import RunConfig, TrainingConfig
from distlm.data.batches import EvaluationBatch, StepOrder, evaluation_batches, in_order_of_batches
from distlm.data.order import permute
from distlm.errors import CheckpointError, NonFiniteLossError
from distlm.run_folder import RunFolder
from distlm.tasks import Batch, Task, make_task
from distlm.tracking.startup import Phase
from distlm.verify_resume.samples import MicroBatch
from distlm.worker.attest import Expected, attest, gather_facts
from distlm.worker.checkpoint import CheckpointSaver, Retention, Saved, load_checkpoint, load_method_state
from distlm.worker.cpu_layers import use_cpu_layers
from distlm.worker.engine import (
    EngineSettings,
    backward,
    build_optimizer,
    global_grad_norm,
    make_accelerator,
    parameter_groups,
    prepare,
    set_learning_rate,
)
from distlm.worker.metrics import StepTimer, measure_matmul_flops, peak_memory_gib, training_flops_per_sample
from distlm.worker.model import load_model
from distlm.worker.patience import Patience
from distlm.worker.prefetch import Prefetcher
from distlm.worker.prepare import Prepared, sample_order
from distlm.worker.profile import StepMap, StepProfiler, describe
from distlm.worker.pulse import Activity
from distlm.worker.schedule import learning_rate_schedule
from distlm.worker.speed_check import gather_speeds, report
from distlm.worker.stop import Votes

_LAST_SAVE_TIMEOUT_S = 60.0
_LEAST_TARGETS = 1e-6  # a step without any has a loss of 0; targets may have weights far below 1


@dataclass(frozen=True)
class WorkerContext:
    """What every worker of an incarnation is told. Rank and world size come from the environment, as for torchrun."""

    config: RunConfig
    prepared: Prepared
    run: RunFolder
    device: str
    """cpu or cuda."""
    checkpoint: Checkpoint | None
    """Committed state to continue from; None: the initial weights."""
    report: Callable[[int, dict[str, float]], None]
    """report(step, values) hands metrics to the recorder without waiting. Called on rank 0 only."""
    warn: Callable[[str], None]
    """Tells the user something in one line. Called on rank 0 only."""
    show: Callable[[str], None] = print
    """Shows the user a text that was asked for. Called on rank 0 only."""
    phase_ended: Callable[[Phase, int], None] = lambda phase, step: None
    """phase_ended(phase, step) tells how far a start has come; `step` is the last one done. On every rank."""
    on_samples: Callable[[list[MicroBatch]], None] | None = None
    """Is told on every rank what it trains on in a step, before it does."""
    beat: Callable[[Activity, int], None] = lambda activity, step: None
    """beat(activity, step) is a sign of life. On every rank."""
    before_commit: Callable[[int], None] = lambda step: None
    """Is called on rank 0 before a checkpoint of this step is committed. What it raises fails the save."""
    is_stop_wanted: Callable[[], bool] = lambda: False
    """Whether this worker wants the training to stop before its end. All stop after the same step if one wants it."""
    stopped: Callable[[int], None] = lambda step: None
    """Is told after which step, which is saved, the training has stopped before its end. Called on rank 0 only."""
    ended_early: Callable[[int], None] = lambda step: None
    """Is told after which step, which is saved, the training is complete since it got no better. On rank 0 only."""
    tables_folder: Path | None = None
    """Where tables of the evaluations go; None: they are not written."""
    profile_folder: Path | None = None
    """Where the map of the profiled steps goes; None: they are not profiled."""


def train(context: WorkerContext) -> None:
    """Train from the given state to the last step, reporting, evaluating and saving on the way. Collective."""
    worker = Worker(context)
    worker.check_speed()
    worker.attest()
    context.phase_ended("load", worker.first_step - 1)
    try:
        train_steps(worker, context.config.training, context.prepared.total_steps)
    except Exception:
        worker.saver.join(_LAST_SAVE_TIMEOUT_S)  # steps that are on their way to the disk need not be lost
        raise


def train_steps(worker: Worker, config: TrainingConfig, last_step: int) -> None:
    """The loop."""
    step = worker.first_step - 1
    if worker.owes_evaluation:
        with worker.timer.paused():
            is_best = worker.evaluate(step)
            if worker.patience.is_exhausted or (is_best and config.load_best_model_at_end):
                worker.save(step)
    for step in range(worker.first_step, last_step + 1) if not worker.patience.is_exhausted else ():
        with worker.profiler.step(step):
            worker.train_step(step)
        stops = worker.votes.want_stop()
        if is_due(step, config.logging_steps, last_step) or step == 1 or stops:
            worker.log(step)
        if step == worker.first_step:
            worker.context.phase_ended("first_step", step)
        with worker.timer.paused():
            if worker.profiler.is_done:
                worker.write_step_map()
            is_best = False
            if is_due(step, config.eval_steps, last_step) and not (stops and step < last_step):
                is_best = worker.evaluate(step)
            ends = stops or worker.patience.is_exhausted
            if is_due(step, config.save_steps, last_step) or ends or (is_best and config.load_best_model_at_end):
                worker.save(step)
        if ends:
            break
    worker.finish_save(step, at_the_end=True)
    if step < last_step and worker.rank == 0:
        (worker.context.ended_early if worker.patience.is_exhausted else worker.context.stopped)(step)


def is_due(step: int, interval: int | None, last_step: int) -> bool:
    """Whether something that happens every `interval` steps, and always at the end, happens after this step."""
    return step == last_step or (interval is not None and step % interval == 0)


def saves_beside_training(config: TrainingConfig, last_step: int) -> bool:
    """Whether checkpoints are written in the background. Where only the end is saved, there is no training to go on
    beside it, and no copy of the state is worth its memory."""
    return config.async_save and config.save_steps is not None and config.save_steps < last_step


class Worker:
    """One rank's engine, data and clocks; its methods are the parts of the loop."""

    def __init__(self, context: WorkerContext) -> None:
        config, prepared = context.config, context.prepared
        self.config, self.prepared, self.context = config, prepared, context
        self.plan = batch_plan(config)
        self.schedule = learning_rate_schedule(config, prepared.total_steps)
        self.settings = EngineSettings(
            zero_stage=config.deepspeed.zero_stage,
            mixed_precision=config.training.mixed_precision,
            gradient_accumulation_steps=self.plan.accumulation_steps,
            micro_batch_size=self.plan.micro_batch,
            max_grad_norm=config.training.max_grad_norm,
            offload_optimizer_device=config.deepspeed.offload_optimizer_device,
            offload_param_device=config.deepspeed.offload_param_device,
            device="cuda" if context.device == "cuda" else "cpu",
            num_parameters=prepared.num_parameters,
        )
        self.accelerator = make_accelerator(self.settings)
        self.device = self.accelerator.device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.task: Task = make_task(config, prepared, context.run.init / "tokenizer")
        model: nn.Module = load_model(
            context.run.init / "model",
            config.model.attn_implementation,
            config.training.gradient_checkpointing,
            config.training.torch_compile,
            config.task.type,
            config.model.quantization,
        )
        if has_adapter(config):
            from distlm.worker.adalora import make_rank_allocation
            from distlm.worker.adapter import load_adapter

            model = load_adapter(model, context.run.init / "adapter")
        self.task.attach(model)
        if self.settings.device == "cpu" and not config.training.torch_compile:
            use_cpu_layers(model)
        optimizer = build_optimizer(
            parameter_groups(model, config.training.weight_decay),
            learning_rate=config.training.learning_rate,
            adam_beta1=config.training.adam_beta1,
            adam_beta2=config.training.adam_beta2,
            adam_epsilon=config.training.adam_epsilon,
        )
        self.engine = prepare(self.accelerator, model, optimizer)
        context.phase_ended("build", context.checkpoint.step if context.checkpoint else 0)
        self.rank_allocation = make_rank_allocation(self.engine) if has_adapter(config) else None
        self.first_step = 1
        unlogged_loss_sum = unlogged_num_targets = 0.0
        self.owes_evaluation = False
        """A stop has left out the evaluation of the last step, and it decides over the training or its final model."""
        self.patience = Patience(config.training, self._is_greater_better())
        if context.checkpoint is not None:
            manifest = load_checkpoint(self.engine, context.checkpoint, seed=config.seed)
            self.first_step = manifest.step + 1
            self.patience.restore(manifest.progress)
            unlogged_num_targets = manifest.progress.unlogged_num_targets
            if self.rank == 0:  # the workers' sums are added up
                unlogged_loss_sum = manifest.progress.unlogged_loss_sum
            decides = config.training.early_stopping_patience is not None or config.training.load_best_model_at_end
            was_due = is_due(manifest.step, config.training.eval_steps, prepared.total_steps)
            self.owes_evaluation = decides and was_due and not manifest.metrics
            if self.rank_allocation is not None:
                self.rank_allocation.load_state(load_method_state(context.checkpoint, manifest))
        self.saver = CheckpointSaver(
            self.engine,
            CheckpointStore(context.run.checkpoints),
            seed=config.seed,
            asynchronous=saves_beside_training(config.training, prepared.total_steps),
            reads_back=has_adapter(config),
            method_state=self.rank_allocation.state if self.rank_allocation is not None else None,
            retention=Retention(
                config.training.save_total_limit,
                metric=f"eval/{config.training.metric_for_best_model}",
                greater_is_better=self._is_greater_better(),
            ),
            before_commit=context.before_commit,
            on_committed=self._report_saved,
        )
        self._evaluation: dict[str, float] = {}
        self._evaluated_step = 0

        self.train_data = self.task.dataset([Path(path) for path in prepared.train_paths])
        lengths = getattr(self.train_data, "lengths", None)
        self.steps = StepOrder(
            sample_order(config, self.train_data.sizes),
            self.plan,
            lengths,
            group_by_length=config.training.group_by_length and lengths is not None,
            max_tokens=config.training.per_device_train_batch_tokens if lengths is not None else None,
            seed=config.seed,
        )
        self.validation_data = self.task.dataset([Path(prepared.validation_path)]) if prepared.validation_path else None
        self.batches = Prefetcher(self._make_batches, prepared.total_steps)
        self.profiler = StepProfiler(self._steps_to_profile(), self.engine, self.task.head(model), self.device)
        self.timer = StepTimer()
        self.votes = Votes(self.device)
        precision = torch.float32 if self.settings.mixed_precision == "no" else torch.bfloat16
        self._matmul_flops = measure_matmul_flops(self.device, precision)
        self.peak_flops = self._mean_over_workers(self._matmul_flops)
        # In double precision, so that what is reported does not depend on the order in which many are added up.
        self._loss_sum = torch.tensor(unlogged_loss_sum, device=self.device, dtype=torch.float64)
        self._num_targets = torch.tensor(unlogged_num_targets, device=self.device, dtype=torch.float64)
        self._num_tokens = torch.zeros((), device=self.device, dtype=torch.float64)

    # --- the parts of the loop ---------------------------------------------------------------------------------------

    def train_step(self, step: int) -> None:
        """One optimizer step on this worker's micro batches."""
        with self.profiler.phase("data"):
            batches = self.batches.get(step)
        mine = [sum(self.task.count_targets(batch) for batch in batches), _num_tokens(batches)]
        counts = torch.tensor([*mine, self.context.is_stop_wanted()], dtype=torch.float32)
        num_targets, num_tokens, num_stop_votes = self._sum_over_workers(counts)
        self.votes.count(num_stop_votes)
        # DeepSpeed averages over workers and accumulation steps; this makes it the mean over all targets of the step.
        scale = self.world_size * self.plan.accumulation_steps / num_targets.clamp(min=_LEAST_TARGETS)
        set_learning_rate(self.engine, self.schedule(step))
        numbers = self.my_micro_batches(step)
        if self.context.on_samples:
            told = zip(numbers, batches, strict=True)
            self.context.on_samples([self._micro_batch(step, m, batch) for m, batch in told])
        for m, batch in zip(numbers, batches, strict=True):
            self.context.beat("training", step)
            torch.manual_seed(dropout_seed(self.config.seed, step, m))
            with self.profiler.phase("forward"):
                loss_sum, _ = self.task.loss(self.engine, batch, self.device)
            backward(self.accelerator, loss_sum * scale, is_last=m == numbers[-1])
            self._loss_sum += loss_sum.detach()
        self._num_targets += num_targets
        self._num_tokens += num_tokens
        self.timer.count(self.plan.global_batch)

    def log(self, step: int) -> None:
        """Report the metrics of the steps since the last call. Collective.

        Raises:
            NonFiniteLossError: the loss is not a number.
            CheckpointError: a save has failed in the meantime, and the config says to stop then.
        """
        values = self._training_metrics(step)
        if self.rank == 0:
            self.context.report(step, values)
        self._require_finite(values["train/loss"], step)
        if self._sum_over_workers(int(self.saver.has_failed)):  # here, where the workers meet on the host anyway
            self.finish_save(step)

    def evaluate(self, step: int) -> bool:
        """Report loss and metrics on the held-out samples; whether they are the best so far. Collective."""
        if self.validation_data is None:
            return False
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        judged = []
        with torch.no_grad():
            for chosen, batch in self.evaluation_batches():
                self.context.beat("evaluating", step)
                loss_sum, predicted = self.task.loss(self.engine, batch, self.device)
                sums += torch.tensor([float(loss_sum), self.task.count_targets(batch)])
                if chosen.is_counted:
                    judged.append(self.task.judge(batch, chosen.indices, predicted))
        self.engine.train()
        loss_sum, num_targets = self._sum_over_workers(sums).tolist()
        loss = loss_sum / max(num_targets, _LEAST_TARGETS)
        self._evaluated_step, self._evaluation = (
            step,
            {"eval/loss": loss} | self._judge(step, judged, loss, num_targets),
        )
        if self.rank == 0:
            self.context.report(step, self._evaluation)
        self._require_finite(loss, step)
        self.patience.look_at(self._evaluation.get(f"eval/{self.config.training.metric_for_best_model}"))
        return self.patience.best_is_new

    def _judge(self, step: int, judged: list[Any], loss: float, num_targets: float) -> dict[str, float]:
        """The task's metrics of what all workers have judged; rank 0 computes them. Collective."""
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(judged, gathered, dst=0)
        box: list[dict[str, float]] = [{}]
        if gathered is not None:
            in_order = in_order_of_batches(gathered)  # so that sums do not depend on the number of workers
            evaluation = self.task.evaluation(in_order, loss, num_targets, self.validation_data)
            box = [{f"eval/{name}": value for name, value in evaluation.metrics.items()}]
            if self.context.tables_folder is not None:
                write_tables(self.context.tables_folder / f"step-{step:08d}", evaluation.tables)
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def save(self, step: int) -> None:
        """Begin to save a checkpoint. Collective. Never saves a broken state."""
        self.context.beat("saving", step)
        unlogged_loss_sum = float(self._sum_over_workers(self._loss_sum.clone()))
        self._require_finite(unlogged_loss_sum, step)
        stopped_at = time.monotonic()
        self.finish_save(step)
        position = step * self.plan.global_batch
        progress = Progress(
            sample_position=position,
            epoch=position // self.prepared.num_train_samples,
            best_metric=self.patience.best,
            num_evaluations_without_improvement=self.patience.num_without_improvement,
            unlogged_loss_sum=unlogged_loss_sum,
            unlogged_num_targets=float(self._num_targets),
        )
        evaluation = self._evaluation if self._evaluated_step == step else {}
        metrics = {k: v for k, v in evaluation.items() if math.isfinite(v)}
        self.saver.save(step, progress, metrics, stopped_at=stopped_at)

    def finish_save(self, step: int, *, at_the_end: bool = False) -> None:
        """Wait for the save under way. If it failed, stop or go on as the config says. Collective.

        Raises:
            CheckpointError: the save failed, and so does the run; at the end it does in any case.
        """
        self.context.beat("saving", step)
        try:
            self.saver.wait()
        except CheckpointError as error:
            if self.config.training.on_save_error == "stop" or at_the_end:
                advice = "make room or mend the storage, then resume the run"
                raise CheckpointError(f"{error}; {advice}", error.failed_ranks) from error
            if self.rank == 0:
                self.context.warn(f"a checkpoint was not saved, training goes on at step {step}: {error}")

    def _report_saved(self, saved: Saved) -> None:
        times = {"time/checkpoint_s": saved.total_s, "time/checkpoint_blocked_s": saved.blocked_s}
        self.context.report(saved.checkpoint.step, times)
        if saved.warning:
            self.context.warn(saved.warning)

    # --- data --------------------------------------------------------------------------------------------------------

    def my_micro_batches(self, step: int) -> range:
        """Which micro batches of a step are this worker's."""
        return range(self.rank, len(self.steps.step(step).micro_batches), self.world_size)

    def _make_batches(self, step: int) -> list[Batch]:
        """This worker's micro batches of a step, in pinned memory where a GPU fetches them from there."""
        batches = [self.micro_batch(step, m) for m in self.my_micro_batches(step)]
        if self.settings.device == "cuda":
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches

    def micro_batch(self, step: int, number: int) -> Batch:
        """A micro batch of a step, masked or labelled."""
        passes, indices, _ = self._samples(step, number)
        return self.task.collate(self.train_data[indices], passes, indices, training=True)

    def _samples(self, step: int, number: int) -> tuple[np.ndarray, np.ndarray, range]:
        """(passes, indices, global positions over the whole run) of the samples of a micro batch."""
        samples = self.steps.step(step)
        cut = samples.micro_batches[number]
        before = (step - 1) * self.plan.global_batch
        return samples.passes[cut], samples.indices[cut], range(before + cut.start, before + cut.stop)

    def _micro_batch(self, step: int, number: int, batch: Batch) -> MicroBatch:
        """Which samples a micro batch holds, for the record."""
        passes, indices, positions = self._samples(step, number)
        return MicroBatch(step, number, list(positions), passes.tolist(), indices.tolist(), batch_sha256(batch))

    def evaluation_batches(self) -> Iterator[tuple[EvaluationBatch, Batch]]:
        """This worker's share of the evaluation: as many batches as every other worker's, since a forward pass is
        collective under ZeRO-3."""
        assert self.validation_data is not None
        training, total = self.config.training, len(self.validation_data)
        chosen = permute(np.arange(min(total, training.max_eval_samples or total)), total, 0, 0)
        lengths = getattr(self.validation_data, "lengths", None)
        batches = evaluation_batches(
            chosen,
            np.full(len(chosen), self.config.data.max_seq_length) if lengths is None else lengths[chosen],
            training.per_device_eval_batch_size,
            None if lengths is None else training.per_device_train_batch_tokens,
            self.world_size,
        )
        for chosen_batch in batches[self.rank :: self.world_size]:
            indices = chosen_batch.indices
            batch = self.task.collate(self.validation_data[indices], np.zeros_like(indices), indices, training=False)
            if not chosen_batch.is_counted:
                self.task.leave_out(batch, torch.ones(len(indices), dtype=torch.bool))
            yield chosen_batch, batch

    # --- before step 1 -----------------------------------------------------------------------------------------------

    def check_speed(self) -> None:
        """Where the workers are on several hosts, tell how fast they are, and which one is slow. Collective."""
        if int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)) == self.world_size:
            return
        speeds = gather_speeds(self.device, self._matmul_flops)
        if self.rank == 0:
            line, problems = report(speeds)
            self.context.show(line)
            for problem in problems:
                self.context.warn(problem)

    def attest(self) -> None:
        """Stop unless the workers train what the config asks for. Collective. Raises AttestationError."""
        step = self.first_step
        positions = [position for m in self.my_micro_batches(step) for position in self._samples(step, m)[2]]
        fingerprints = {
            self._samples(step, m)[2].start: batch_sha256(self.micro_batch(step, m))
            for m in range(len(self.steps.step(step).micro_batches))
        }
        facts = gather_facts(self.engine, self.accelerator, positions, fingerprints)
        expected = Expected(
            world_size=self.config.resources.world_size,
            zero_stage=self.config.deepspeed.zero_stage,
            device_type=self.settings.device,
            first_position=(step - 1) * self.plan.global_batch,
            global_batch_size=self.plan.global_batch,
        )
        attest(facts, expected)

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _training_metrics(self, step: int) -> dict[str, float]:
        loss = float(self._sum_over_workers(self._loss_sum)) / max(float(self._num_targets), _LEAST_TARGETS)
        speed = self.timer.collect(int(self._num_tokens))
        for total in (self._loss_sum, self._num_targets, self._num_tokens):
            total.zero_()
        flops = self._flops_per_sample() * speed["throughput/samples_per_s"]
        return {
            "train/loss": loss,
            "learning_rate": self.schedule(step),
            "grad_norm": global_grad_norm(self.engine),
            **speed,
            "throughput/device/mfu": flops / (self.peak_flops * self.world_size),
            "memory/peak_gib": self._max_over_workers(peak_memory_gib(self.device)),
            "epoch": step * self.plan.global_batch / self.prepared.num_train_samples,
        }

    def _flops_per_sample(self) -> float:
        return training_flops_per_sample(self.prepared.forward_flops_per_sample, has_adapter(self.config))

    def _is_greater_better(self) -> bool:
        return METRICS[problem_kind(self.config)][self.config.training.metric_for_best_model]

    def _steps_to_profile(self) -> range:
        """Those of `profile.steps` that this attempt trains."""
        asked = profiled_steps(self.config) if self.context.profile_folder else range(0)
        if not asked:
            return asked
        steps = range(max(asked[0], self.first_step), min(asked[-1], self.prepared.total_steps) + 1)
        if steps != asked and self.rank == 0:
            trains = f"this attempt trains steps {self.first_step} to {self.prepared.total_steps}"
            self.context.warn(f"of profile.steps = {self.config.profile.steps}, {len(steps)} are profiled: {trains}")
        return steps

    def write_step_map(self) -> None:
        """Write this worker's trace, and on rank 0 the map of all workers. Collective."""
        assert self.context.profile_folder is not None
        mine = self.profiler.result(self.context.profile_folder / f"rank-{self.rank:05d}.trace.json")
        maps: list[StepMap] = [mine] * self.world_size
        dist.all_gather_object(maps, mine)
        if self.rank == 0:
            flops = self._flops_per_sample() * self.plan.global_batch
            text = describe(maps, self.profiler.steps, flops / self.world_size, self.peak_flops)
            (self.context.profile_folder / "step_map.md").write_text(text, encoding="utf-8")
            self.context.show(text)

    def _require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss} at step {step}; lower training.learning_rate "
                f"({self.config.training.learning_rate}), raise training.warmup_steps, or set "
                "training.mixed_precision: no to see whether precision is the cause"
            )

    def _sum_over_workers(self, value: torch.Tensor | int) -> torch.Tensor:
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float32)
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor

    def _mean_over_workers(self, value: float) -> float:
        return float(self._sum_over_workers(torch.tensor(value, dtype=torch.float64))) / self.world_size

    def _max_over_workers(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)


def _num_tokens(batches: list[Batch]) -> int:
    """Tokens, without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def write_tables(folder: Path, tables: dict[str, str]) -> None:
    """Write the tables of an evaluation, if it has any."""
    for name, content in tables.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def batch_sha256(batch: Batch) -> str:
    """Hash of a batch on the host, as the model will see it."""
    return hashlib.sha256(b"".join(batch[name].numpy().tobytes() for name in sorted(batch))).hexdigest()


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of the random numbers inside the model for one micro batch, whichever worker computes it."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
