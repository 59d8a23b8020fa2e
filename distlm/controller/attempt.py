"""The course of one attempt: Ray, preflight, preparation, incarnations until the policy says enough, then the model."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.config.attempt import Attempt, load_attempt
from distlm.config.resolve import at_world_size, possible_world_sizes, semantic_params
from distlm.config.schema import RunConfig
from distlm.controller import preflight
from distlm.controller.capacity import choose_world_size, free_nodes, on_this_node, places
from distlm.controller.cluster import Cluster, connect
from distlm.controller.cluster_watch import ClusterWatch
from distlm.controller.environment import versions
from distlm.controller.first_failure import advice
from distlm.controller.hang import WorkerProcess, end_hung_workers, end_workers
from distlm.controller.helper import ClusterHelper, Helper, LocalHelper
from distlm.controller.progress import Progress
from distlm.controller.provenance import Provenance
from distlm.controller.recorder import Recorder, RecorderMailbox
from distlm.controller.stop import StopRequest
from distlm.controller.trainer import Incarnation, remove_placement_groups
from distlm.controller.watchdog import Watchdog
from distlm.data.notes import PreparationProgress, notes
from distlm.errors import (
    Cause,
    CheckpointError,
    DistlmError,
    ExitCode,
    InfrastructureError,
    InputError,
    Problem,
    UnknownFormatError,
)
from distlm.outcome import Outcome, Retry, iso_time, on_rank, tracker_status
from distlm.redact import copy_redacted
from distlm.retry_policy import NO_RETRIES, Decision, RetryPolicy
from distlm.run_folder import NUM_OWN_NODES, AttemptFolder, RunFolder, read_json, read_yaml, write_json
from distlm.tracking import Tracker
from distlm.tracking.records import Record, now_ms
from distlm.tracking.startup import phase_ended
from distlm.worker.entry import WorkerArguments
from distlm.worker.prepare import Prepared

if TYPE_CHECKING:
    from distlm.tracking.mlflow import MlflowTracker

_POLL_INTERVAL_S = 0.5
_REPORT_INTERVAL_S = 1.0
_LAST_MESSAGES_TIMEOUT_S = 30.0
_TRACKER_TIMEOUT_S, _TRACKER_TIMEOUT_S_WHEN_STOPPED = 60.0, 5.0
_PROVENANCE_TIMEOUT_S = 10.0
_SETTLING_S = 5.0
"""Nodes that come together are not taken one by one."""
_ENDED_WITH_IT = (Cause.NODE_LOST, Cause.INFRASTRUCTURE)
"""What happens to a run whose end was announced: who ends it may end its workers, or Ray, first."""
_NOT_RECORDED = ("pulse", "placed", "saving")
"""Kinds of messages that are for the controller alone."""


class AttemptController:
    """Runs one attempt in the run's folder. `stop` is set from outside to end it early."""

    def __init__(self, run: RunFolder, folder: AttemptFolder, progress: Progress, stop: StopRequest) -> None:
        self.run, self.folder, self.progress, self.stop = run, folder, progress, stop
        loaded = load_attempt(run, folder)
        self.config: RunConfig = loaded.config
        # A rehearsed failure is to end the attempt.
        is_rehearsal = Attempt.read(folder).kill_in_step is not None
        self.policy = RetryPolicy(NO_RETRIES if is_rehearsal else self.config.recovery)
        self.failures: list[dict[str, Any]] = []
        self._retries: list[Retry] = []
        self._workers: dict[int, WorkerProcess] = {}
        """By rank, those of the incarnation."""
        self._possible_sizes = possible_world_sizes(self.config)
        self._resizing = False
        """The workers were asked to stop so that another number of them, or others, can go on."""
        self._grows_since_s: float | None = None
        """Since when there has been room for more workers."""
        self._phases: list[dict[str, Any]] = [phase_ended("begin", 1)]
        """Of starting up, as long as they are not recorded."""
        self._tracker: MlflowTracker | None = None
        self._tracker_deadline_s: float | None = None
        """Until when (of the monotonic clock) the tracker may answer; None: it has, or we wait no longer."""
        self._helper: Helper
        self._has_begun = False
        """Workers were started in this attempt."""
        self._is_training = self._has_passed_on_stop = False
        """The workers have done a step that no earlier checkpoint holds."""
        self._stopped_after_step: int | None = None
        self._is_complete_after_step: int | None = None
        """The last step of the training, where it ends before that of the config."""
        self._asked_for: Any = None
        """Reference to messages of the workers that have been asked for and have not come yet."""

    def execute(self, temporary_root: Path | None) -> Outcome:
        """From nothing to the outcome. Raises DistlmError for what is refused before anything is recorded."""
        self._stop_if_asked()
        self._provenance = Provenance(self.run, self.folder, self.progress.say)
        address = os.environ.get("RAY_ADDRESS")
        is_on_a_worker_node = not address or NUM_OWN_NODES in os.environ
        with ExitStack() as ray_scope:
            if is_on_a_worker_node:
                self._begin_to_prepare(ray_scope.enter_context(closing(LocalHelper())))
            self.progress.phase("ray", f"connecting to the Ray cluster at {address}" if address else "starting Ray")
            cluster = ray_scope.enter_context(
                connect(self.config.resources, self._possible_sizes, self.run.path, temporary_root, self._stop_if_asked)
            )
            self._phases.append(phase_ended("ray", 1))
            self._check_cluster(cluster)
            if not is_on_a_worker_node:
                self._begin_to_prepare(ClusterHelper())
            prepared = self._prepare()
            checkpoint = self._checkpoint_to_continue()
            self._refuse_fewer_steps(prepared, checkpoint)
            with Recorder(self.run, self.folder, self._tracker_factory()) as recorder:
                outcome = self._train_and_export(recorder, cluster, prepared, checkpoint)
                ray_scope.close()  # the machines are free while the rest is sent
                self._finish(recorder, outcome)
        return outcome

    def _train_and_export(
        self, recorder: Recorder, cluster: Cluster, prepared: Prepared, checkpoint: Checkpoint | None
    ) -> Outcome:
        try:
            self._describe(recorder, cluster, prepared)
            # MLflow is imported, connected to and asked in a thread while the workers start, which takes longer.
            self._tracker_deadline_s = time.monotonic() + _TRACKER_TIMEOUT_S
            outcome = self._train(recorder, cluster, prepared, checkpoint)
            while outcome.exit_code == ExitCode.SUCCEEDED and self._tracker_deadline_s is not None:
                self._stop_if_asked()
                self._check_tracker(recorder, _POLL_INTERVAL_S)
            if outcome.exit_code == ExitCode.SUCCEEDED:
                self._export(self._is_complete_after_step or prepared.total_steps)
        except InputError:  # its problems are shown one by one
            raise
        except DistlmError as error:
            outcome = Outcome.of(error, traceback.format_exc())
        if self.stop.is_asked and outcome.cause in _ENDED_WITH_IT:
            what = f"stopped {self._when()}: {outcome.message}, before the workers had saved"
            outcome = Outcome.of(self.stop.error(what))
        outcome = replace(outcome, retries=self._retries)
        if outcome.exit_code == ExitCode.INFRASTRUCTURE and cluster.logs and cluster.logs.is_dir():
            _copy_logs(cluster.logs, self.folder.logs / "ray")
        return outcome

    # --- before training ---------------------------------------------------------------------------------------------

    def _check_cluster(self, cluster: Cluster) -> None:
        """Preflight: what only the cluster can tell."""
        self._stop_if_asked()
        self._first_size = preflight.check_capacity(self.config, cluster)
        preflight.check_quantization(self.config, cluster.device)
        preflight.check_nodes(cluster, Attempt.read(self.folder).distlm_version)
        self._stop_if_asked()
        self._phases.append(phase_ended("preflight", 1))

    def _begin_to_prepare(self, helper: Helper) -> None:
        self._helper = helper
        helper.begin(_prepare_task, str(self.run.path), str(self.folder.path))

    def _prepare(self) -> Prepared:
        """Wait for everything that is made once."""
        self.progress.phase("prepare", "preparing data, tokenizer and initial weights")
        self._import_ahead()
        prepared: Prepared = self._result_of_helper(self._show_preparation)
        for note in notes(prepared.data_info["sources"]):
            self.progress.say(note)
        task = self.config.task
        if task.type == "masked-lm" and task.masked_only_head and not prepared.masked_only_head:
            self.progress.say(
                "warning: this model's head cannot compute masked positions alone, and computes all "
                "(task.masked_only_head)"
            )
        if prepared.drawn_weights:
            names = ", ".join(sorted({name.rpartition(".")[0] for name in prepared.drawn_weights}))
            self.progress.say(f"model: the pretrained model has no {names} for this task; new weights are drawn")
        for source in prepared.train_mixture if len(prepared.train_mixture) > 1 else []:
            self.progress.say(
                f"data: {source['name']}: {source['share']:.1%} of the samples, "
                f"{source['passes_per_epoch']:.3g} passes per epoch"
            )
        self.progress.say(
            f"data: {prepared.data_info['train']['num_tokens']:,} tokens in {prepared.num_train_samples:,} samples"
            f"{' (from the cache)' if prepared.data_was_cached else ''}; model: {prepared.num_parameters:,} parameters"
            f"{_trained_share(prepared)}"
        )
        CheckpointStore(self.run.checkpoints).clean()  # what a killed save left takes room
        preflight.check_free_space(self.config, self.run, prepared.num_parameters)
        self._phases.append(phase_ended("prepare", 1))
        return prepared

    def _import_ahead(self) -> None:
        """Import what is needed next while another process prepares: 1.5 s for Ray Train, 2.5 s for MLflow."""
        import distlm.controller.ray_train  # noqa: F401

        if "mlflow" in self.config.tracking.report_to and not (self._helper.is_done(0) or self.stop.is_asked):
            import mlflow  # noqa: F401

    def _refuse_fewer_steps(self, prepared: Prepared, checkpoint: Checkpoint | None) -> None:
        if checkpoint and checkpoint.step > prepared.total_steps:
            message = f"the run has {checkpoint.step} steps already; give that or more"
            raise InputError(Problem(message, "training.max_steps", str(prepared.total_steps)))

    def _show_preparation(self) -> None:
        """What `_prepare_task` has written last."""
        if (told := read_json(self.folder.preparation_json)) is not None:
            self.progress.preparation(PreparationProgress(**told))

    def _result_of_helper(self, while_waiting: Callable[[], None] = lambda: None) -> Any:
        """Unless the attempt is stopped first. Raises what the helper's function raises."""
        self._stop_if_asked()
        while not self._helper.is_done(_POLL_INTERVAL_S):
            self._stop_if_asked()
            while_waiting()
        self._stop_if_asked()
        return self._helper.result()

    def _stop_if_asked(self) -> None:
        """Where nothing is trained there is nothing to save."""
        if self.stop.is_asked:
            raise self.stop.error(f"stopped {self._when()}")

    def _checkpoint_to_continue(self) -> Checkpoint | None:
        """Every byte of it is read, which takes minutes for a large one."""
        found: Future[Checkpoint | None] = Future()

        def look() -> None:
            try:
                found.set_result(checkpoint_to_continue(self.run, self.progress))
            except Exception as error:  # noqa: BLE001 - carried over to the controller's thread
                found.set_exception(error)

        threading.Thread(target=look, name="verify-checkpoint", daemon=True).start()
        while not wait([found], _POLL_INTERVAL_S).done:
            self._stop_if_asked()
        return found.result()

    def _when(self) -> str:
        newest = CheckpointStore(self.run.checkpoints).checkpoints()[:1]
        return f"with step {newest[0].step} saved" if newest else "before the first step was saved"

    def _pass_on_stop(self, mailbox: Any) -> None:
        """Asked to stop, have the workers finish their step and save; asked again, or before they train, stop here."""
        if not self.stop.is_asked:
            return
        if self.stop.is_urgent or not self._is_training:
            self._stop_if_asked()
        if not self._has_passed_on_stop:
            self._has_passed_on_stop = True
            mailbox.want_stop.remote()
            self.progress.stopping(f"stopping: the workers finish their step and save it ({self.stop.reason})")

    # --- training ----------------------------------------------------------------------------------------------------

    def _train(
        self, recorder: Recorder, cluster: Cluster, prepared: Prepared, checkpoint: Checkpoint | None
    ) -> Outcome:
        """Incarnation after incarnation, until one succeeds or the policy says enough."""
        incarnation = 1
        progress_at_failure = checkpoint.step if checkpoint else 0
        while True:
            config = at_world_size(self.config, self._wait_for_room(cluster))
            outcome = self._train_once(config, recorder, cluster, prepared, checkpoint, incarnation)
            if outcome is not None:
                newest = CheckpointStore(self.run.checkpoints).newest_step()
                decision = self.policy.decide(outcome, has_progressed=newest > progress_at_failure)
                if self.stop.is_asked:
                    return outcome
                if not decision.try_again:
                    message = f"{outcome.message} ({decision.reason})" if decision.reason else outcome.message
                    return replace(outcome, message=message)
                self._note_failure(recorder, outcome, incarnation, decision)
                self._pause(decision.pause_s)
                progress_at_failure = newest
            checkpoint = self._checkpoint_to_continue()
            incarnation += 1

    def _wait_for_room(self, cluster: Cluster) -> int:
        """The number of workers for the next incarnation: of the possible ones, the largest that there is room for."""
        if cluster.watch is None:
            return self._first_size
        deadline = time.monotonic() + self.config.recovery.start_timeout_s
        least, has_said = self._possible_sizes[0], False
        settled_s = time.monotonic() + _SETTLING_S
        while True:
            self._stop_if_asked()
            cluster.require_alive()
            cluster.watch.look()  # now, and not a second ago
            self._tell_of_unfit_nodes(cluster.watch)
            room = places(cluster.watch.nodes, cluster.device, cluster.cpus_per_worker)
            if (size := choose_world_size(self._possible_sizes, room)) is not None:
                if self._has_begun:  # what is in use may be our own, of the workers before
                    return size
                free = places(free_nodes(cluster.watch.nodes), cluster.device, cluster.cpus_per_worker)
                size_now = choose_world_size(self._possible_sizes, free)
                if size_now == size or (size_now is not None and time.monotonic() > settled_s):
                    return size_now
                if not has_said and time.monotonic() > settled_s:
                    has_said = True
                    self.progress.say(
                        f"waiting for room: the cluster has room for {room} workers, and others use it but for {free}; "
                        f"{least} are needed, of {cluster.needs_of_worker} each"
                    )
                deadline = time.monotonic() + self.config.recovery.start_timeout_s
            elif time.monotonic() > deadline:
                raise InfrastructureError(
                    f"the nodes of the cluster have room for {room} workers, and {least} are needed; waited "
                    f"{self.config.recovery.start_timeout_s:g} s (recovery.start_timeout_s)"
                )
            elif not has_said:
                has_said = True
                self.progress.say(f"waiting for nodes: there is room for {room} workers, and {least} are needed")
            time.sleep(_POLL_INTERVAL_S)

    def _note_failure(self, recorder: Recorder, outcome: Outcome, incarnation: int, decision: Decision) -> None:
        """Say, and write down, what has failed and that it is tried again."""
        self._phases = [phase_ended("begin", incarnation + 1)]
        retry = Retry(
            incarnation=incarnation,
            cause=outcome.cause,
            rank=outcome.rank,
            host=outcome.host,
            message=outcome.message,
            step=outcome.step,
            from_step=CheckpointStore(self.run.checkpoints).newest_step(),
            failed_at=iso_time(time.time()),
        )
        self._retries.append(retry)
        recorder.record([{"kind": "event", "event": "retry", "timestamp_ms": now_ms(), **asdict(retry)}])
        where = on_rank(retry.rank, retry.host)
        self.progress.say(
            f"warning: {retry.cause}{where}: {retry.message}; going on from step {retry.from_step} {decision.how}"
        )

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            self._stop_if_asked()
            time.sleep(min(left_s, _POLL_INTERVAL_S))

    def _train_once(
        self,
        config: RunConfig,
        recorder: Recorder,
        cluster: Cluster,
        prepared: Prepared,
        checkpoint: Checkpoint | None,
        number: int,
    ) -> Outcome | None:
        """One incarnation, with the number of workers that `config` has. None: it has stopped for one of another
        size."""
        import ray

        cluster.require_alive()  # Ray waits for a minute for a head that has died meanwhile
        step = checkpoint.step if checkpoint else 0
        if step == prepared.total_steps:
            return Outcome(ExitCode.SUCCEEDED)
        if checkpoint:
            self.progress.say(f"continuing from checkpoint {checkpoint.path.name}")
        recorder.restored(step, number)
        self._phases = self._phases or [phase_ended("begin", number)]
        recorder.record(self._phases)
        num_workers = config.resources.world_size
        recorder.set_tags({"distlm.world_size": str(num_workers)})
        self.progress.phase("workers", f"starting {num_workers} workers on {cluster.device}")
        self.progress.training(step, prepared.total_steps, cluster.device)
        mailbox = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=on_this_node())(RecorderMailbox).remote()
        arguments = WorkerArguments(
            run_path=str(self.run.path),
            attempt_path=str(self.folder.path),
            incarnation=number,
            device=cluster.device,
            num_workers=num_workers,
            cpus_per_worker=cluster.cpus_per_worker,
            checkpoint=str(checkpoint.path) if checkpoint else None,
            checkpoint_step=step,
            mailbox=mailbox,
            communication=config.resources.communication,
        )
        self._stop_if_asked()
        self._workers, self._watchdog = {}, Watchdog(self.config.recovery)
        self._is_training = self._has_passed_on_stop = self._resizing = False
        self._stopped_after_step = self._grows_since_s = None
        self._has_begun = True
        incarnation = Incarnation(config, cluster, self.folder, arguments)
        ended: Outcome | None = None
        while incarnation.is_alive():
            self._pass_on_stop(mailbox)
            self._check_tracker(recorder)
            self._provenance.record(recorder)
            cluster.require_alive()
            if cluster.watch:
                self._tell_of_unfit_nodes(cluster.watch)
                self._follow_nodes(cluster, cluster.watch, mailbox, num_workers)
            time.sleep(_POLL_INTERVAL_S)
            self._record(recorder, mailbox)
            ended = ended or self._end_if_hung(incarnation) or self._end_if_a_node_is_gone(cluster)
        deadline = time.monotonic() + _LAST_MESSAGES_TIMEOUT_S
        self._record(recorder, mailbox)
        while self._asked_for and time.monotonic() < deadline:
            self._record(recorder, mailbox)
        self._asked_for, self._phases = None, []
        ray.kill(mailbox)  # whatever may be left of the workers commits nothing any more
        outcome = ended or incarnation.outcome(self.failures)
        if outcome.exit_code == ExitCode.SUCCEEDED and self._stopped_after_step is not None:
            if self._resizing and not self.stop.is_asked:
                return None
            return Outcome.of(self.stop.error(f"stopped after step {self._stopped_after_step}, which is saved"))
        if outcome.exit_code != ExitCode.SUCCEEDED:
            remove_placement_groups(cluster, {worker.placement_group_id for worker in self._workers.values()})
        step_of_failure = outcome.step if outcome.step is not None else self._watchdog.step
        return replace(outcome, advice=advice(outcome.cause, config), step=step_of_failure)

    def _tell_of_unfit_nodes(self, watch: ClusterWatch) -> None:
        for problem in watch.new_problems():
            self.progress.say(f"warning: a node is not used: {problem}")

    def _follow_nodes(self, cluster: Cluster, watch: ClusterWatch, mailbox: Any, num_workers: int) -> None:
        """Have the workers save and stop where more could go on, or where some are on a node that is about to leave;
        without room for any others, the attempt is preempted, unless nodes are replaced there."""
        if not self._is_training or self._has_passed_on_stop or self.stop.is_asked or not watch.nodes:
            return
        ours = {worker.node_id for worker in self._workers.values()}
        leaving = [node for node in watch.nodes if node.is_draining and node.id in ours]
        size = choose_world_size(self._possible_sizes, places(watch.nodes, cluster.device, cluster.cpus_per_worker))
        if leaving and size is None and not cluster.replaces_nodes:
            self.stop.announced(f"Ray drains {leaving[0].host}, and there is no room elsewhere")
            return
        if not leaving and (size is None or size <= num_workers):
            self._grows_since_s = None
            return
        now_s = time.monotonic()
        self._grows_since_s = self._grows_since_s or now_s
        if leaving or now_s - self._grows_since_s >= _SETTLING_S:
            why = f"Ray drains {leaving[0].host}" if leaving else "nodes have come"
            self._has_passed_on_stop = self._resizing = True
            mailbox.want_stop.remote()
            how = "they go on when another one has come" if size is None else f"{size} go on in place of {num_workers}"
            self.progress.say(f"{why}: the workers save, and {how}")

    def _end_if_hung(self, incarnation: Incarnation) -> Outcome | None:
        """Kill the workers if they do not go on; who of them does not, and where it is."""
        if not (complaint := self._watchdog.complaint()):
            return None
        if self._workers:
            self.progress.say(f"warning: {complaint}; looking for the worker that hangs")
            return end_hung_workers(self._sorted_workers(), self.folder, complaint)
        if not incarnation.abort():
            return None
        return Outcome(ExitCode.INFRASTRUCTURE, f"the workers have not started: {complaint}", cause=Cause.HANG)

    def _end_if_a_node_is_gone(self, cluster: Cluster) -> Outcome | None:
        """Kill the workers that are left where others have gone with their node: no connection may tell them."""
        workers = self._sorted_workers()
        lost = [worker for worker in workers if cluster.watch and cluster.watch.is_gone(worker.node_id)]
        if not lost:
            return None
        end_workers([worker for worker in workers if worker not in lost], self.folder)
        first, message = lost[0], "the worker's node does not answer any more"
        return Outcome(ExitCode.INFRASTRUCTURE, message, first.rank, first.host, cause=Cause.NODE_LOST)

    def _sorted_workers(self) -> list[WorkerProcess]:
        return sorted(self._workers.values(), key=lambda worker: worker.rank)

    def _record(self, recorder: Recorder, mailbox: Any) -> None:
        """Move what the workers reported to the files and the screen."""
        import ray

        # A late answer is waited for again and not asked for anew: the mailbox has given its messages away by then.
        self._asked_for = self._asked_for or mailbox.drain.remote()
        try:
            messages = ray.get(self._asked_for, timeout=10 * _POLL_INTERVAL_S)
        except ray.exceptions.GetTimeoutError:
            return
        except ray.exceptions.RayActorError:
            messages = []
        self._asked_for = None
        saved_steps = [message["step"] for message in messages if message["kind"] == "saving"]
        is_recorded = recorder.record(
            [message for message in messages if message["kind"] not in _NOT_RECORDED], durably=bool(saved_steps)
        )
        if saved_steps and is_recorded:
            mailbox.confirm.remote(max(saved_steps))
        for message in messages:
            self._watchdog.heard(message)
            if message["kind"] == "failure":
                self.failures.append(message)
            elif message["kind"] == "placed":
                self._workers[message["rank"]] = WorkerProcess.of(message)
            elif message["kind"] == "metrics":
                self.progress.metrics(message["step"], message["values"])
            elif message.get("event") == "warning":
                self.progress.say(f"warning: {message['message']}")
            elif message.get("event") == "phase":
                self._phases.append(message)
                if message["phase"] == "first_step":
                    self._is_training = True
                    self._record_startup(recorder, message)
            elif message.get("event") == "stopped":
                self._stopped_after_step = message["step"]
            elif message.get("event") == "ended_early":
                self._is_complete_after_step = message["step"]
                self.progress.say(
                    f"training ends after step {message['step']}: {self.config.training.metric_for_best_model} was no "
                    f"better in {self.config.training.early_stopping_patience} evaluations"
                )
            elif message.get("event") == "note":
                self.progress.say(message["message"])

    def _record_startup(self, recorder: Recorder, first_step: dict[str, Any]) -> None:
        """The workers train: how long it took them, and everything before them, to begin."""
        startup_s = (first_step["timestamp_ms"] - self._phases[0]["timestamp_ms"]) / 1000
        step, incarnation, timestamp_ms = (first_step[key] for key in ("step", "incarnation", "timestamp_ms"))
        recorder.record([Record(step, incarnation, timestamp_ms, {"time/startup_s": startup_s}).to_message()])
        self._phases = []

    # --- after training ----------------------------------------------------------------------------------------------

    def _export(self, last_step: int) -> None:
        """Write model/ in Hugging Face format from the last step's checkpoint or the best one, where no worker's memory
        is needed."""
        self.progress.phase("export", "writing the model")
        wanted = "best" if self.config.training.load_best_model_at_end else str(last_step)
        self._helper.begin(_export_task, str(self.run.path), wanted)
        self._result_of_helper()

    def _describe(self, recorder: Recorder, cluster: Cluster, prepared: Prepared) -> None:
        """Hand params, tags and the data set to the tracker."""
        config, attempt = self.config, Attempt.read(self.folder)
        recorder.log_params(semantic_params(read_yaml(self.run.run_yaml)))
        recorder.set_tags(
            {
                "distlm.attempt": str(self.folder.number),
                "distlm.target": attempt.target,
                "distlm.device": cluster.device,
                "distlm.zero_stage": str(config.deepspeed.zero_stage),
                "distlm.overrides": " ".join([*attempt.overrides]),
                "distlm.run_folder": str(self.run.path),
                "mlflow.source.name": "distlm",
                "distlm.num_parameters": str(prepared.num_parameters),
                "distlm.num_trainable_parameters": str(prepared.num_trainable_parameters),
                **{f"distlm.version.{package}": version for package, version in versions().items()},
            }
        )
        for split, context, path in (
            ("train", "training", str(Path(prepared.train_paths[0]).parent)),
            ("validation", "evaluation", prepared.validation_path),
        ):
            if path is not None:
                counts = prepared.data_info[split]
                recorder.log_dataset(
                    name=split,
                    digest=counts["content_sha256"][:32],
                    source=path,
                    context=context,
                    columns={"input_ids": "long"},
                    profile={"num_rows": counts["num_blocks"], "num_tokens": counts["num_tokens"]},
                )
        recorder.log_artifact(self.run.run_yaml)
        recorder.log_artifact(self.folder.attempt_yaml, f"attempts/{self.folder.number:03d}")
        self._provenance.prepared(recorder)

    def _check_tracker(self, recorder: Recorder, wait_s: float = 0.0) -> None:
        """See whether the tracker takes this run, until it has answered. Raises InputError or AttestationError."""
        if self._tracker_deadline_s is None:
            return
        if recorder.check_tracker(wait_s):
            self._tracker_deadline_s = None
        elif time.monotonic() > self._tracker_deadline_s:
            self._tracker_deadline_s = None
            self.progress.say(
                f"warning: MLflow does not answer ({recorder.tracker_problem}); metrics are kept in the run's "
                "folder and sent when it does"
            )

    def _finish(self, recorder: Recorder, outcome: Outcome) -> None:
        """Logs, status and model to the tracker. What it does not take now is kept for `distlm sync`."""
        is_hurried = self.stop.is_asked or outcome.needs_new_attempt  # a new attempt sends what is missing, too
        self._provenance.record(recorder, 1.0 if is_hurried else _PROVENANCE_TIMEOUT_S)
        for log in sorted(self.folder.logs.glob("*.log")):
            recorder.log_artifact(log, f"attempts/{self.folder.number:03d}/logs")
        for file in sorted(self.folder.evaluations.glob("*/*")):
            recorder.log_artifact(file, f"evaluations/{file.parent.name}")
        for file in sorted(self.folder.profile.glob("*.md")):  # traces may be too large to be sent in time
            recorder.log_artifact(file, f"attempts/{self.folder.number:03d}/profile")
        problem = ""
        # Of a run that has not ended by a request, each one is to stop this; of others, the next one is.
        num_requests = 0 if outcome.exit_code == ExitCode.SUCCEEDED else self.stop.num_requests

        def give_up() -> bool:
            return self.stop.num_requests > num_requests

        timeout_s = _TRACKER_TIMEOUT_S_WHEN_STOPPED if is_hurried else _TRACKER_TIMEOUT_S
        try:
            is_delivered = recorder.close(tracker_status(outcome.exit_code), timeout_s, give_up)
        except InfrastructureError as error:
            if outcome.exit_code == ExitCode.SUCCEEDED:
                raise
            self.progress.say(f"warning: {error}")  # the cause of both, if it is one, is in the outcome
            return
        if not is_delivered:
            problem = recorder.tracker_problem or "it was not waited for any longer"
        elif self._tracker and self.config.tracking.log_model and outcome.exit_code == ExitCode.SUCCEEDED:
            from distlm.tracking.model_upload import upload_once

            self.progress.phase("upload", "uploading the model to MLflow")
            problem = upload_once(
                self.run,
                self._tracker.mlflow_run_id,
                self._tracker.tracking_uri,
                self.config.tracking.registered_model_name,
                give_up,
            )
        if problem:
            self.progress.say(
                f"warning: MLflow has not got everything ({problem}); nothing is lost: send the rest with "
                f"`distlm sync {self.run.run_id}`"
            )

    def _tracker_factory(self) -> Callable[[], Tracker] | None:
        if "mlflow" not in self.config.tracking.report_to:
            return None

        def connect_to_mlflow() -> Tracker:
            from distlm.tracking.sync import connect_mlflow  # mlflow takes 3 s to import, in the delivery's thread

            self._tracker = connect_mlflow(self.config, self.run)
            return self._tracker

        return connect_to_mlflow


def _trained_share(prepared: Prepared) -> str:
    trained, total = prepared.num_trainable_parameters, prepared.num_parameters
    return f", of which {trained:,} ({trained / total:.2%}) are trained" if trained < total else ""


def checkpoint_to_continue(run: RunFolder, progress: Progress) -> Checkpoint | None:
    """The newest good checkpoint; None: the run has none yet. Newer ones that are damaged are named in the progress.

    Raises:
        CheckpointError: there are some and none is good, or a newer one is of another format version. To go on without
            them would be to train again, perhaps from the start, what they hold.
    """
    checkpoint, skipped = CheckpointStore(run.checkpoints).latest_good()
    for error in skipped:
        if isinstance(error, UnknownFormatError):
            raise error
        progress.say(f"warning: a checkpoint is not used: {error}")
    if skipped and checkpoint is None:
        raise CheckpointError(
            f"none of the run's checkpoints can be used; the newest: {skipped[0]}; to train from the start, move "
            f"{run.checkpoints} away"
        )
    return checkpoint


def _copy_logs(source: Path, destination: Path) -> None:
    """A help in finding a cause, and no cause of its own: where there is no room, nothing is copied."""
    try:
        shutil.copytree(source, destination, ignore_dangling_symlinks=True, copy_function=copy_redacted)
    except OSError:
        shutil.rmtree(destination, ignore_errors=True)


def _prepare_task(run_path: str, attempt_path: str) -> Prepared:
    from distlm.worker.entry import redirect_output
    from distlm.worker.prepare import prepare_run

    run, folder = RunFolder(Path(run_path)), AttemptFolder(Path(attempt_path))
    redirect_output(folder.logs / "prepare.log")
    with suppress(OSError):  # a process of a cluster begins elsewhere; what is missing there is named by who needs it
        os.chdir(Attempt.read(folder).working_directory)
    told_at_s = -math.inf

    def report(progress: PreparationProgress) -> None:
        # By a file in the shared folder, which needs no process more.
        nonlocal told_at_s
        if time.monotonic() - told_at_s >= _REPORT_INTERVAL_S:
            told_at_s = time.monotonic()
            write_json(folder.preparation_json, progress.to_json())

    try:
        return prepare_run(load_attempt(run, folder).config, run, report)
    finally:
        folder.preparation_json.unlink(missing_ok=True)


def _export_task(run_path: str, wanted: str) -> None:
    from distlm.worker.export import export_run

    export_run(RunFolder(Path(run_path)), wanted)
