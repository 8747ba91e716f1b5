"""The config: YAML, then ``key=value`` overrides, then types, bounds and cross-field checks.

Whatever is wrong becomes one ``UserError`` line with the key, the value and the nearest valid one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from disttrain import batching, compression, tasks
from disttrain.batching import AdaScale, BatchPolicy
from disttrain.comm import Watch
from disttrain.compression.policy import POLICY_KEYS, Policy
from disttrain.errors import UserError
from disttrain.optim.averaging import Average
from disttrain.optim.layers.groups import Layers
from disttrain.optim.optimizers.sections import OptimizerSection, optimizers
from disttrain.optim.schedules import ReduceOnPlateau, Schedule, schedules
from disttrain.tasks import Task
from disttrain.tasks.paths import LocalPath, expand_home
from disttrain.training.checkpoints.folder import Best
from disttrain.training.config import yaml_values
from disttrain.training.monitoring.early_stopping import EarlyStopping
from disttrain.training.monitoring.health import Health
from disttrain.training.precision import LossScaling, Precision, check_precision
from disttrain.training.start_from import StartFrom
from disttrain.validation import Registry, Section, hint, keys_of, unknown_key, validate

# Sections that a name chooses the fields of.
_NAMED: dict[str, Registry[Any]] = {
    "task": tasks.registry,
    "optimizer": optimizers,
    "schedule": schedules,
    "compressor": compression.registry,
    "batch": batching.registry,
}


class Evaluation(Section):
    """When and how the held-out data is evaluated; always at the end as well."""

    every_epochs: int | None = Field(default=1, ge=1)
    every_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=256, ge=1, description="samples a forward pass; batches go round the ranks in turn")


class Checkpoint(Section):
    """When the run is saved. Without ``every_epochs`` and ``every_steps`` it never is, else also at the end."""

    every_epochs: int | None = Field(default=1, ge=1)
    every_steps: int | None = Field(default=None, ge=1)
    keep: int = Field(default=2, ge=1, description="how many of the newest checkpoints stay on disk")
    keep_best: Best | None = Field(default=None, description="keep the best checkpoint too; null: the newest alone")
    background: bool = Field(default=True, description="write while training goes on, from a copy in main memory")
    in_flight: int = Field(default=1, ge=1, le=8, description="how many are copied or being written at a time")
    residuals: Literal["keep", "flush"] = Field(
        default="keep", description="a file a rank with its own; flush: every rank takes their mean, saved once"
    )
    on_error: Literal["stop", "continue"] = Field(
        default="stop", description="when one cannot be written: end the run, or warn and go on to the next"
    )

    @property
    def enabled(self) -> bool:
        return self.every_epochs is not None or self.every_steps is not None


class Config(Section):
    """One run. ``task``, ``optimizer``, ``schedule`` and ``compressor`` have a ``name`` and that one's own fields."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    name: str = Field(default="run", description="the run directory is <output>/<name>")
    output: LocalPath = "runs"
    seed: int = Field(default=0, ge=0, lt=2**63)
    engine: Literal["auto", "single", "torch", "horovod", "mpi"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: float = Field(
        default=300.0,
        gt=0,
        description="seconds that torch.distributed waits for the others, to start and later, and a worker for a batch "
        "of its loader_workers",
    )
    watch: Watch = Watch()
    dtype: Literal["float32", "float64"] = Field("float32", description="of parameters and floating-point inputs")
    precision: Precision = Field(
        default="fp32", description="of forward and backward, by autocast; fp16 scales the loss: see loss_scale"
    )
    loss_scale: LossScaling = LossScaling()
    deterministic: bool = Field(default=True, description="prefer algorithms that give the same bits in every run")
    task: Annotated[Task, BeforeValidator(tasks.registry.build)] = Field(
        description="a registered task (digits, text) or an import path 'package.module:Class'"
    )
    batch_size: int = Field(
        default=64, ge=1, description="samples an optimizer step, over all workers and accumulation steps together"
    )
    drop_last: bool = Field(
        default=False,
        description="leave out the last step of an epoch if it has fewer samples (batch normalisation fails on one)",
    )
    accumulation: int = Field(default=1, ge=1, description="backward passes an optimizer step")
    batch: Annotated[BatchPolicy, BeforeValidator(batching.registry.build)] = Field(
        default="fixed",  # type: ignore[assignment]
        description="how the batch grows: fixed, schedule, plateau, noise_scale, norm_test, adascale",
    )
    epochs: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(
        default=None, ge=1, description="of epochs and max_steps, whichever comes first ends the run"
    )
    optimizer: Annotated[OptimizerSection, BeforeValidator(optimizers.build)] = Field(
        description="sgd, adagrad, adadelta, rmsprop, adam, adamw, lars or lamb"
    )
    layers: Layers = Layers()
    schedule: Annotated[Schedule, BeforeValidator(schedules.build)] = Field(default="constant")  # type: ignore[assignment]
    compressor: Annotated[Policy, BeforeValidator(Policy.build)] = Field(default="dense")  # type: ignore[assignment]
    bucket_mb: float | None = Field(
        default=None, gt=0, description="MiB of gradient sent together; null: the compressor's choice"
    )
    clip_norm: float | None = Field(default=None, gt=0, description="largest global norm of the mean gradient")
    clip_value: float | None = Field(
        default=None, gt=0, description="largest magnitude of an entry of the mean gradient; before clip_norm"
    )
    start_from: StartFrom | None = Field(
        default=None, description="weights to begin with, to fine-tune; null: what the task builds"
    )
    average: Average | None = Field(
        default=None, description="moving average of the weights, which is then what is evaluated; null: none"
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="end when a held-out metric gets no better; null: go on to the last step"
    )
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    health: Health = Health()
    resume: LocalPath = Field(
        default="never", description="never, auto (the newest whole checkpoint, if any), or a checkpoint's path"
    )
    log_every: int = Field(default=10, ge=1, description="steps between two records in metrics.jsonl")
    num_threads: int | None = Field(
        default=None, ge=1, description="torch's threads a worker; null: cores / workers of the host"
    )
    loader_workers: int = Field(
        default=0, ge=0, description="processes that load data for each worker; 0: the worker itself"
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.+=-]*", name):
            raise UserError(
                "should be a folder's name, of letters, digits and . _ - + = ('output' is the folder above it)"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.epochs is None and self.max_steps is None:
            raise UserError("missing key 'epochs': set epochs, max_steps or both, to say when the run ends")
        if self.batch_size % self.accumulation:
            raise UserError(_does_not_divide(self.batch_size, 1, self.accumulation))
        check_precision(self.precision, self.dtype)
        self.loss_scale.build()
        self.batch.check(self.batch_size, self.epochs, self.max_steps)
        if isinstance(self.batch, AdaScale) and self.optimizer.base_batch_size is not None:
            raise UserError(
                "optimizer.base_batch_size and batch.name=adascale both scale the learning rate: "
                "remove the former, batch.base_batch_size says what optimizer.lr is meant for"
            )
        if self.early_stopping and self.evaluation.every_epochs is None and self.evaluation.every_steps is None:
            raise UserError(
                "early_stopping looks at evaluations: set evaluation.every_epochs or evaluation.every_steps"
            )
        if self.checkpoint.keep_best and self.evaluation.every_epochs is None and self.evaluation.every_steps is None:
            raise UserError("checkpoint.keep_best looks at evaluations: set evaluation.every_epochs or every_steps")
        if self.max_steps is not None:
            self.schedule.check(self.max_steps)
        self._check_recipe()
        return self

    def _check_recipe(self) -> None:
        """Optimizer, layers and schedule against each other and the rest."""
        if not self.optimizer.layerwise and (odd := [rule for rule in self.layers.rules if rule.adapt is not None]):
            raise UserError(
                f"layers.rules ({odd[0].match!r}) has adapt, which is for trust ratios: set optimizer.name to lars or "
                "lamb, or leave it out"
            )
        never = self.evaluation.every_epochs is None and self.evaluation.every_steps is None
        if isinstance(self.schedule, ReduceOnPlateau) and self.schedule.metric != "loss" and never:
            raise UserError(
                f"schedule.metric={self.schedule.metric!r} looks at evaluations: set evaluation.every_epochs or "
                "evaluation.every_steps"
            )

    @property
    def directory(self) -> Path:
        return Path(self.output) / self.name

    def check_world_size(self, world_size: int) -> None:
        """Raise UserError if a full batch cannot be split evenly over the workers."""
        if self.batch_size % (world_size * self.accumulation):
            raise UserError(_does_not_divide(self.batch_size, world_size, self.accumulation))

    def to_dict(self) -> dict[str, Any]:
        """All values as plain data: ``load``'s inverse."""
        values = self.model_dump(mode="json", serialize_as_any=True)
        for key in _NAMED:
            section = getattr(self, key)
            values[key] = section.to_dict() if isinstance(section, Policy) else _NAMED[key].dump(section)
        return values

    def to_yaml(self) -> str:
        return yaml_values.dump(self.to_dict())


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply overrides such as ``optimizer.lr=0.1``.

    An override that changes a section's ``name`` starts that section anew: the file's other keys in it belong to the
    old name.

    Raises:
        UserError: the file is missing or no YAML, an override is malformed, or a key or value is wrong.
    """
    config = _read(Path(expand_home(os.fspath(path))))
    changes = _parse_overrides(overrides)
    for key in _NAMED:
        if _section_name(changes.get(key)) not in (None, _section_name(config.get(key))):
            config.pop(key, None)
    try:
        merged = OmegaConf.merge(config, changes)
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return from_dict({str(key): value for key, value in values.items()})


def from_dict(values: Mapping[str, Any]) -> Config:
    """A config from plain data.

    Raises:
        UserError: a key or value is wrong.
    """
    odd = [key for key in values if key not in Config.model_fields]
    if odd:  # looked at first, so that the hint can also offer the keys of the sections that the names have chosen
        raise UserError("; ".join(_explain_unknown(key, values) for key in odd))
    return validate(Config, values)


def _explain_unknown(key: str, values: Mapping[str, Any]) -> str:
    value, known = values[key], _known_keys(values)
    if isinstance(value, Mapping) and value:  # optimzer.lr=0.1: name the whole key, so the whole key is offered
        return "; ".join(unknown_key(f"{key}.{inner}", given, known) for inner, given in value.items())
    return unknown_key(key, value, known)


def _known_keys(values: Mapping[str, Any]) -> list[str]:
    """All dotted keys, with those of the named sections as far as their names are right."""
    keys = [key for key in keys_of(Config) if key.partition(".")[0] not in _NAMED]
    for key, registry in _NAMED.items():
        keys += [key, f"{key}.name"]
        with contextlib.suppress(UserError):
            keys += [f"{key}.{inner}" for inner in keys_of(registry.get(str(_section_name(values.get(key)))))]
    keys += [f"compressor.{inner}" for inner in POLICY_KEYS]
    return keys


def _section_name(section: Any) -> str | None:
    return section.get("name") if isinstance(section, Mapping | DictConfig) else section


def _read(path: Path) -> DictConfig:
    if path.is_dir():
        raise UserError(f"config {str(path)!r} is a folder; {_nearby(path / path.name)}")
    try:
        config = OmegaConf.load(path)  # refuses keys that are given twice, and aliases that expand without end
        if isinstance(config, DictConfig):
            with path.open(encoding="utf-8") as file:
                config = OmegaConf.create(yaml_values.read(file) or {})
    except FileNotFoundError:
        raise UserError(f"config {str(path)!r} does not exist; {_nearby(path)}") from None
    except (OSError, ValueError) as error:  # no UTF-8, or no path
        raise UserError(f"config {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"config {str(path)!r} should be a mapping of keys to values")
    return config


def _nearby(path: Path) -> str:
    """What lies where the user looked: the nearest name first."""
    folder = next(folder for folder in (path.parent, *path.parents) if folder.is_dir())
    found = sorted(str(file) for pattern in ("*.yaml", "*.yml", "*/*.yaml") for file in folder.glob(pattern))[:200]
    return hint(str(path), found).removeprefix("; ") or f"there is no .yaml file in {str(folder.resolve())!r}"


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or not all(part.isidentifier() for part in key.split(".")):
            raise UserError(f"override {override!r} should be key=value, such as optimizer.lr=0.1")
    try:
        parsed = OmegaConf.from_dotlist(list(overrides))
        for key, _, value in (override.partition("=") for override in overrides):
            OmegaConf.update(parsed, key, yaml_values.read(value))
        changes = OmegaConf.to_container(parsed, resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"overrides {' '.join(overrides)!r}: {' '.join(str(error).split())}") from error
    assert isinstance(changes, dict)
    return {str(key): value for key, value in changes.items()}


def _does_not_divide(batch_size: int, world_size: int, accumulation: int) -> str:
    parts = world_size * accumulation
    below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
    who = f"{world_size} worker{'s' * (world_size > 1)}"
    if accumulation > 1:
        who += f" x accumulation={accumulation}"
    choices = f"{below} or {above}" if below else str(above)
    return f"batch_size={batch_size} does not divide evenly among {who}: use batch_size={choices}"
