"""manifest.json: what a checkpoint holds and where, as its writer saw it. Written last, so it commits the checkpoint.

A parameter is one flat row of fp32 elements, of each kind in `KINDS`. A shard holds fragments of parameters; the
fragments of all shards tile every trainable parameter exactly once, whatever world size and ZeRO stage wrote them, so
any other can read them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distlm.errors import CheckpointError, UnknownFormatError

METHOD_STATE_NAME = "method-state.safetensors"
FORMAT_VERSION = 2
"""Raised with every change that older code would misread. 1 listed each kind's ranges by parameter name."""
KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""The fp32 weight and Adam's two moments, under the names torch.optim gives them."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
_SHARD_NAME = r"^shard-[0-9]{5,9}-of-[0-9]{5,9}\.safetensors$"


class Fragment(NamedTuple):
    """Elements start..start+numel of a flattened parameter, all kinds of them. Parameters count from 0."""

    parameter: Count
    start: Count
    numel: Annotated[int, Field(ge=1, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Parameter(_Part):
    """A trainable parameter: its name in the model and its full shape."""

    name: str
    shape: Annotated[list[Count], Field(max_length=64)]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Shard(_Part):
    """One file of a checkpoint, as its writer saw it."""

    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    fragments: list[Fragment]


class StateFile(_Part):
    """A file with what a training method keeps besides weights and moments, as its writer saw it."""

    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Progress(_Part):
    """Where training continues."""

    sample_position: Count
    """Samples trained on so far, over all workers; the next step begins with the sample of this position."""
    epoch: Count
    """Epoch that this position is in, from 0."""
    best_metric: float | None = None
    """The best value so far of the metric for the best model; None: nothing was evaluated."""
    num_evaluations_without_improvement: Count = 0
    """One after the other, for early stopping."""
    unlogged_loss_sum: float = 0.0
    """Of the steps since the last point of the training loss, over all workers."""
    unlogged_num_targets: float = 0.0
    """What it is the sum over."""


class Optimizer(_Part):
    """What AdamW needs besides the moments."""

    adam_step: Count
    """Updates so far, from which the bias correction follows."""
    groups: list[dict[str, Any]]
    """Hyper-parameters of the parameter groups: a record, the run's config decides."""
    loss_scaler: dict[str, int | float] | None
    """State of fp16's dynamic loss scale; None in other precisions."""


class Manifest(_Part):
    """The content of manifest.json."""

    format_version: int = FORMAT_VERSION
    step: Count
    progress: Progress
    seed: int
    """Seed of the run. The random state is not part of a checkpoint: dropout, masking and the order of samples follow
    from the seed and the step."""
    world_size: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    mixed_precision: str
    versions: dict[str, str]
    """Of the packages that wrote it."""
    metrics: dict[str, float] = {}
    """The evaluation at this step, where there was one, such as eval/loss."""
    parameters: list[Parameter]
    optimizer: Optimizer
    shards: dict[Annotated[str, Field(pattern=_SHARD_NAME)], Shard]
    method_state: StateFile | None = None
    """What the training method keeps, such as AdaLoRA's importance of each rank; most keep nothing."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Full shape by name, in the model's order."""
        return {parameter.name: parameter.shape for parameter in self.parameters}

    @property
    def size_bytes(self) -> int:
        """Of all files but the manifest."""
        others = self.method_state.size_bytes if self.method_state else 0
        return sum(shard.size_bytes for shard in self.shards.values()) + others

    def to_json(self) -> str:
        content = self.model_dump(mode="json")
        return json.dumps({"manifest_sha256": _content_sha256(content), **content}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises CheckpointError if the text is torn or altered or contradicts itself, UnknownFormatError if it is of
        another format version."""
        try:
            content = json.loads(text)
            expected = content.pop("manifest_sha256")
            version, is_altered = content["format_version"], _content_sha256(content) != expected
            if version != FORMAT_VERSION:
                text = f"has format version {version}, and this distlm reads {FORMAT_VERSION}"
                if is_altered:
                    raise CheckpointError(f"{text}; it was altered, too")
                raise UnknownFormatError(f"{text}; use the distlm that wrote it")
            if is_altered:
                raise CheckpointError("was altered: its content does not match its own SHA-256")
            manifest = cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(f"is wrong at {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"is damaged: {type(error).__name__}: {error}") from error
        manifest.check_coverage()
        return manifest

    def check_coverage(self) -> None:
        """Raise CheckpointError unless the fragments tile every parameter exactly once."""
        if len(self.shapes) != len(self.parameters):
            raise CheckpointError("names a parameter twice")
        places: list[list[tuple[int, int]]] = [[] for _ in self.parameters]
        for shard in self.shards.values():
            for parameter, start, numel in shard.fragments:
                if parameter >= len(self.parameters):
                    raise CheckpointError(
                        f"has fragments of parameter {parameter}, and there are {len(self.parameters)} parameters"
                    )
                places[parameter].append((start, numel))
        for whole, tiles in zip(self.parameters, places, strict=True):
            position = 0
            for start, numel in sorted(tiles):
                if start != position:
                    problem = "is missing" if start > position else "is there twice"
                    raise CheckpointError(f"says that {whole.name} {problem} at element {min(start, position)}")
                position += numel
            if position != whole.numel:
                raise CheckpointError(f"covers {position} of {whole.numel} elements of {whole.name}")


def tensor_name(parameter: str, kind: str, start: int) -> str:
    """Name in a shard of the elements start.. of a parameter."""
    return f"{parameter}:{kind}:{start}"


def shard_tensors(
    parameters: Sequence[Parameter], fragments: Sequence[Fragment]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape) of the tensors of a shard, in the order in which they stand there: kind by kind."""
    return {
        tensor_name(parameters[fragment.parameter].name, kind, fragment.start): ("F32", (fragment.numel,))
        for kind in KINDS
        for fragment in fragments
    }


def _content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
