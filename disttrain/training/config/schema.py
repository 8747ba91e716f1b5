"""The schema of a config: types, bounds and cross-field checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from disttrain import batching, compression, tasks
from disttrain.batching import AdaScale, BatchPolicy
from disttrain.comm import ENGINES, Watch
from disttrain.compression.policy import Policy
from disttrain.errors import UserError
from disttrain.optim.averaging import Average
from disttrain.optim.layers.groups import Layers
from disttrain.optim.optimizers.sections import OptimizerSection, optimizers
from disttrain.optim.schedules import ReduceOnPlateau, Schedule, schedules
from disttrain.tasks import Task
from disttrain.tasks.paths import LocalPath
from disttrain.training.checkpoints.folder import Best
from disttrain.training.config import yaml_values
from disttrain.training.monitoring.early_stopping import EarlyStopping
from disttrain.training.monitoring.health import Health
from disttrain.training.precision import LossScaling, Precision, check_precision
from disttrain.training.run.progress import Progress
from disttrain.training.start_from import StartFrom
from disttrain.validation import Registry, Section

_ENGINE_NAMES = ("auto", *ENGINES)

# Sections whose fields depend on their "name".
NAMED_SECTIONS: dict[str, Registry[Any]] = {
    "task": tasks.registry,
    "optimizer": optimizers,
    "schedule": schedules,
    "compressor": compression.registry,
    "batch": batching.registry,
}


class _Periodic(Section):
    """Something that is done at intervals of epochs, of steps, or both."""

    every_epochs: int | None = Field(default=1, ge=1, description="null: not by epochs")
    every_steps: int | None = Field(default=None, ge=1, description="null: not by steps")

    @property
    def enabled(self) -> bool:
        return self.every_epochs is not None or self.every_steps is not None

    def is_due(self, progress: Progress) -> bool:
        """Whether it happens after the last step."""
        by_step = self.every_steps is not None and progress.step % self.every_steps == 0
        by_epoch = self.every_epochs is not None and progress.epoch % self.every_epochs == 0
        return by_step or (by_epoch and progress.offset == 0)


class Evaluation(_Periodic):
    """When and how the held-out data is evaluated; always at the end too."""

    batch_size: int = Field(
        default=256, ge=1, description="samples per forward pass; batches are assigned to ranks in turn"
    )


class Checkpoint(_Periodic):
    """When and how the run is saved. Without ``every_epochs`` and ``every_steps`` never, otherwise at the end too."""

    keep: int = Field(default=2, ge=1, description="how many of the newest checkpoints to keep")
    keep_best: Best | None = Field(default=None, description="keep the best checkpoint too; null: only the newest")
    background: bool = Field(default=True, description="write while training continues, from a copy in main memory")
    in_flight: int = Field(default=1, ge=1, le=8, description="how many checkpoints are written at a time")
    residuals: Literal["keep", "flush"] = Field(
        default="keep",
        description="keep: each rank saves its own; flush: replace all ranks' by their mean, which is saved once",
    )
    on_error: Literal["stop", "continue"] = Field(
        default="stop", description="when a checkpoint cannot be written: end the run, or warn and continue"
    )


class Config(Section):
    """One run. The ``name`` of ``task``, ``optimizer``, ``schedule``, ``compressor`` or ``batch`` sets the fields."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    name: str = Field(default="run", description="the run directory is <output>/<name>")
    output: LocalPath = "runs"
    seed: int = Field(default=0, ge=0, lt=2**63)
    engine: Literal[_ENGINE_NAMES] = "auto"  # type: ignore[valid-type]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: float = Field(
        default=300.0,
        gt=0,
        description="seconds that torch.distributed waits for other workers, and a worker for a batch from its "
        "loader_workers",
    )
    watch: Watch = Watch()
    dtype: Literal["float32", "float64"] = Field("float32", description="dtype of parameters and floating-point inputs")
    precision: Precision = Field(
        default="fp32",
        description="of forward and backward, by autocast; fp16 scales the loss: see loss_scale",
    )
    loss_scale: LossScaling = LossScaling()
    deterministic: bool = Field(default=True, description="prefer algorithms that give the same bits in every run")
    task: Annotated[Task, BeforeValidator(tasks.registry.build)] = Field(
        description="a registered task (digits, text) or an import path 'package.module:Class'"
    )
    batch_size: int = Field(
        default=64, ge=1, description="samples per optimizer step, over all workers and backward passes"
    )
    drop_last: bool = Field(
        default=False,
        description="leave out the last step of an epoch if it has fewer samples (batch normalization fails on one)",
    )
    accumulation: int = Field(default=1, ge=1, description="backward passes per optimizer step")
    batch: Annotated[BatchPolicy, BeforeValidator(batching.registry.build)] = Field(
        default="fixed",  # type: ignore[assignment]
        description="how the batch grows: fixed, schedule, plateau, noise_scale, norm_test, adascale",
    )
    epochs: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(
        default=None, ge=1, description="epochs or max_steps ends the run, whichever comes first"
    )
    optimizer: Annotated[OptimizerSection, BeforeValidator(optimizers.build)] = Field(
        description="sgd, adagrad, adadelta, rmsprop, adam, adamw, lars or lamb"
    )
    layers: Layers = Layers()
    schedule: Annotated[Schedule, BeforeValidator(schedules.build)] = Field(default="constant")  # type: ignore[assignment]
    compressor: Annotated[Policy, BeforeValidator(Policy.build)] = Field(default="dense")  # type: ignore[assignment]
    bucket_mb: float | None = Field(
        default=None, gt=0, description="MiB of gradients per bucket; null: the compressor's default"
    )
    clip_norm: float | None = Field(default=None, gt=0, description="maximum global norm of the mean gradient")
    clip_value: float | None = Field(
        default=None, gt=0, description="maximum magnitude of an element of the mean gradient; applied before clip_norm"
    )
    start_from: StartFrom | None = Field(
        default=None, description="weights to start from, to fine-tune; null: those of the task's new model"
    )
    average: Average | None = Field(
        default=None, description="moving average of the weights, which replaces them in evaluation; null: none"
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="end when a held-out metric no longer improves; null: run to the last step"
    )
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    health: Health = Health()
    resume: LocalPath = Field(
        default="never", description="never, auto (from the newest complete checkpoint, if any), or a checkpoint's path"
    )
    log_every: int = Field(default=10, ge=1, description="steps between records in metrics.jsonl")
    num_threads: int | None = Field(
        default=None, ge=1, description="torch's threads per worker; null: cores / workers of the host"
    )
    loader_workers: int = Field(
        default=0, ge=0, description="processes per worker that load data; 0: the worker itself does"
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.+=-]*", name):
            raise UserError(
                "should be the name of a folder, of letters, digits and . _ - + = ('output' is the folder above it)"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.epochs is None and self.max_steps is None:
            raise UserError("missing key 'epochs': set epochs, max_steps or both, which end the run")
        if self.batch_size % self.accumulation:
            raise UserError(_does_not_divide(self.batch_size, 1, self.accumulation))
        check_precision(self.precision, self.dtype)
        self.loss_scale.build()
        self.batch.check(self.batch_size, self.epochs, self.max_steps)
        if isinstance(self.batch, AdaScale) and self.optimizer.base_batch_size is not None:
            raise UserError(
                "optimizer.base_batch_size and batch.name=adascale both scale the learning rate: "
                "remove the former; batch.base_batch_size is the batch that optimizer.lr is meant for"
            )
        if self.max_steps is not None:
            self.schedule.check(self.max_steps)
        self._check_recipe()
        return self

    def _check_recipe(self) -> None:
        """Check optimizer, layers, schedule and evaluation against each other."""
        if not self.optimizer.layerwise and (odd := [rule for rule in self.layers.rules if rule.adapt is not None]):
            raise UserError(
                f"layers.rules ({odd[0].match!r}) sets adapt, which is for trust ratios: set optimizer.name to lars or "
                "lamb, or remove adapt"
            )
        plateau = self.schedule if isinstance(self.schedule, ReduceOnPlateau) else None
        needs_evaluation = {
            "early_stopping": self.early_stopping is not None,
            "checkpoint.keep_best": self.checkpoint.keep_best is not None,
            f"schedule.metric={plateau and plateau.metric!r}": plateau is not None and plateau.metric != "loss",
        }
        if not self.evaluation.enabled and (keys := [key for key, needs in needs_evaluation.items() if needs]):
            raise UserError(f"{keys[0]} needs evaluations: set evaluation.every_epochs or evaluation.every_steps")

    @property
    def directory(self) -> Path:
        return Path(self.output) / self.name

    def check_world_size(self, world_size: int) -> None:
        """Raise UserError if a batch cannot be split evenly over the workers."""
        if self.batch_size % (world_size * self.accumulation):
            raise UserError(_does_not_divide(self.batch_size, world_size, self.accumulation))

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain data, from which ``from_dict`` makes the config again."""
        values = self.model_dump(mode="json", serialize_as_any=True)
        for key in NAMED_SECTIONS:
            section = getattr(self, key)
            values[key] = section.to_dict() if isinstance(section, Policy) else NAMED_SECTIONS[key].dump(section)
        return values

    def to_yaml(self) -> str:
        return yaml_values.dump(self.to_dict())


def _does_not_divide(batch_size: int, world_size: int, accumulation: int) -> str:
    parts = world_size * accumulation
    below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
    who = f"{world_size} worker{'s' * (world_size > 1)}"
    if accumulation > 1:
        who += f" x accumulation={accumulation}"
    choices = f"{below} or {above}" if below else str(above)
    return f"batch_size={batch_size} does not divide evenly among {who}: use batch_size={choices}"
