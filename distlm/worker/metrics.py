"""What a worker measures about itself and its node: speed, arithmetic, memory, utilisation.

FLOPs are counted with a multiplication and an addition as two. Model FLOPs utilisation (MFU) is the model's FLOP/s as
counted here, over the peak of the device as measured here: A. Chowdhery et al., PaLM, 2022, appendix B.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any, Self

import psutil
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, PretrainedConfig

from distlm.tasks.masked_lm import MaskedOnlyHead
from distlm.tracking.records import Record, now_ms

_log = logging.getLogger(__name__)

# The backward pass multiplies once for the inputs and once for the weights, if these are trained.
_PASSES, _PASSES_OF_ADAPTER = 3, 2
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


class StepTimer:
    """Time per step and tokens per second between two logging points, without evaluation and checkpointing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._restart()

    def count(self, num_samples: int) -> None:
        """One step is done; `num_samples` are those of its global batch."""
        self._num_steps += 1
        self._num_samples += num_samples

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out."""
        start_s = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - start_s

    def collect(self, num_tokens: int) -> dict[str, float]:
        """The values since the last call, and a new beginning; empty when no step was done or no time went by.
        `num_tokens` are those of the steps since then, padding not counted.

        On a CUDA device wait for its work first (reading the loss does), or the last steps are not in the time.
        """
        elapsed_s = self._clock() - self._start_s - self._paused_s
        num_steps, num_samples = self._num_steps, self._num_samples
        self._restart()
        if not num_steps or elapsed_s <= 0:
            return {}
        return {
            "time/step_s": elapsed_s / num_steps,
            "throughput/tokens_per_s": num_tokens / elapsed_s,
            "throughput/samples_per_s": num_samples / elapsed_s,
        }

    def _restart(self) -> None:
        self._start_s = self._clock()
        self._paused_s = 0.0
        self._num_steps = self._num_samples = 0


@cache
def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The FLOP/s of `device` in products of large square matrices: the best of as many as fit into `seconds`.

    Computed as training does, by a linear layer under autocast. Measured once in a process.
    """
    size = _MATMUL_SIZE[device.type]
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best_s = float("inf")
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        functional.linear(left, right)  # not timed: the first one loads the library and picks a kernel
        _synchronize(device)
        deadline_s = time.perf_counter() + seconds
        while best_s == float("inf") or time.perf_counter() < deadline_s:
            start_s = time.perf_counter()
            functional.linear(left, right)
            _synchronize(device)
            best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_flops_per_sample(
    config: PretrainedConfig,
    sequence_length: int,
    num_predicted: float | None = None,
    auto_class: Any = AutoModelForMaskedLM,
) -> float:
    """FLOPs of one forward pass of the model of `config`, of a class of transformers, over one sequence.

    `num_predicted` is the mean number of positions that the prediction head computes, where it does not compute all of
    `sequence_length`. Attention in a sliding window counts as full attention. Counted on the meta device, without
    memory and weights, or where a model looks at the values of its tensors, as DeBERTa does, on the CPU.

    Raises:
        HeadError: the model has no head that could compute some positions only.
    """
    try:
        return _count_flops(config, sequence_length, num_predicted, auto_class, "meta")
    except (RuntimeError, NotImplementedError):
        return _count_flops(config, sequence_length, num_predicted, auto_class, "cpu")


def _count_flops(
    config: PretrainedConfig, sequence_length: int, num_predicted: float | None, auto_class: Any, device: str
) -> float:
    with torch.device(device), torch.no_grad():
        # Eager attention consists of plain matrix products, which the counter knows on every device.
        # The copy, because from_config writes that choice into the config it is given.
        model = auto_class.from_config(deepcopy(config), attn_implementation="eager", trust_remote_code=False).eval()
        model.requires_grad_(False)
        # Without an attention mask: transformers would read its values.
        inputs = {"input_ids": torch.zeros(1, sequence_length, dtype=torch.long)}
        with FlopCounterMode(display=False) as counter:
            if num_predicted is None:
                model(**inputs)
            else:
                positions = torch.zeros(round(num_predicted), dtype=torch.long)
                MaskedOnlyHead(model).logits_at(positions, model, inputs)
    return float(counter.get_total_flops())


def training_flops_per_sample(forward_flops: float, has_adapter: bool = False) -> float:
    """FLOPs of a forward and a backward pass. What activation checkpointing computes again is not counted (MFU), nor
    what an adapter adds."""
    return (_PASSES_OF_ADAPTER if has_adapter else _PASSES) * forward_flops


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far: of the device by this process's tensors, or on CPU by this process in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class SystemMonitor:
    """Samples the load of one node in a thread and sends records of kind system; run it in one process per node.

    Keys are MLflow's own with the node between, such as system/0/cpu_utilization_percentage, so that MLflow's page for
    system metrics shows them. The step of a sample is the number of whole intervals since the run was created: it goes
    on over attempts, and each step comes once. GPUs are sampled where nvidia-ml-py is installed, all of the node.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], object],
        node_rank: int,
        incarnation: int,
        run_created_s: float,
        interval_s: float = 10.0,
    ) -> None:
        """`send` gets each record's message and must not wait. `run_created_s` is in seconds since the epoch."""
        self._send = send
        self._prefix = f"system/{node_rank}/"
        self._incarnation = incarnation
        self._run_created_s = run_created_s
        self._interval_s = interval_s
        self._gpus = _open_gpus()
        self._network_at_start = psutil.net_io_counters()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-monitor", daemon=True)

    def __enter__(self) -> Self:
        psutil.cpu_percent()  # the first call starts the measurement and returns 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> dict[str, float]:
        """The node's load now; CPU utilisation is that since the last call."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(os.sep)
        network, start = psutil.net_io_counters(), self._network_at_start
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (network.bytes_recv - start.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - start.bytes_sent) / 1e6,
        }
        for index, gpu in enumerate(self._gpus):
            values |= {f"gpu_{index}_{name}": value for name, value in _sample_gpu(gpu).items()}
        return {self._prefix + name: value for name, value in values.items()}

    def _run(self) -> None:
        step = self._intervals_since_creation()
        while True:
            # At the interval's end, so that two samples never fall into one interval.
            step = max(step + 1, self._intervals_since_creation() + 1)
            if self._stop.wait(self._run_created_s + step * self._interval_s - time.time()):
                return
            try:
                values = self.sample()
            except (OSError, psutil.Error) as error:
                _log.warning("system metrics end here: %s", error)
                return
            self._send(Record(step, self._incarnation, now_ms(), values, kind="system").to_message())

    def _intervals_since_creation(self) -> int:
        return int((time.time() - self._run_created_s) // self._interval_s)


def _open_gpus() -> list[Any]:
    """NVML handles of the node's GPUs; none without nvidia-ml-py or without a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _sample_gpu(gpu: Any) -> dict[str, float]:
    """What this GPU tells of itself; some cannot tell their utilisation (MIG) or power."""
    import pynvml

    def memory() -> dict[str, float]:
        used = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        return {
            "memory_usage_percentage": 100 * used.used / used.total,
            "memory_usage_megabytes": used.used / 1e6,
        }

    def utilization() -> dict[str, float]:
        return {"utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu}

    def power() -> dict[str, float]:
        milliwatts = pynvml.nvmlDeviceGetPowerUsage(gpu)
        return {
            "power_usage_watts": milliwatts / 1000,
            "power_usage_percentage": 100 * milliwatts / pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu),
        }

    values: dict[str, float] = {}
    for read in (memory, utilization, power):
        try:
            values |= read()
        except pynvml.NVMLError:
            continue
    return values
