"""Ray Train without the actors that do nothing for distlm: each is a process that imports Ray Train, data sets and all,
while the workers start and need the cores. Loaded where Ray Train is."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_UNUSED = (
    DatasetsCallback,  # gives out Ray Data
    PlacementGroupCleanerCallback,  # asks Ray's dashboard; distlm removes placement groups itself
)


class Trainer(DataParallelTrainer):
    """A call of Ray Train. `has_autoscaler`: the cluster may be one that starts nodes for who asks for them."""

    def __init__(self, *arguments: Any, has_autoscaler: bool, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._has_autoscaler = has_autoscaler

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, _UNUSED)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if not self._has_autoscaler:
            settings["scaling_policy"] = _WithoutAutoscaler(scaling_config=self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


class _WithoutAutoscaler(FixedScalingPolicy):
    """Tells nobody what resources the workers need: there is only what there is."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass
