"""Loading a config: YAML, then ``key=value`` overrides, then validation.

Mistakes become one-line UserErrors with the key, the value and the nearest valid one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from disttrain.compression.policy import POLICY_KEYS
from disttrain.errors import UserError
from disttrain.tasks.paths import expand_home
from disttrain.training.config import yaml_values
from disttrain.training.config.schema import NAMED_SECTIONS, Config
from disttrain.validation import hint, keys_of, unknown_key, validate


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply overrides such as ``optimizer.lr=0.1``.

    An override that changes a section's ``name`` discards the section's other keys in the file, which belong to the old
    name.

    Raises:
        UserError: the file is missing or not YAML, an override is malformed, or a key or value is invalid.
    """
    config = _read(Path(expand_home(os.fspath(path))))
    changes = _parse_overrides(overrides)
    for key in NAMED_SECTIONS:
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
    """Return a config from plain data.

    Raises:
        UserError: a key or value is invalid.
    """
    unknown = [key for key in values if key not in Config.model_fields]
    if unknown:  # checked here, since pydantic cannot suggest the keys of the sections that the names select
        raise UserError("; ".join(_explain_unknown(key, values) for key in unknown))
    return validate(Config, values)


def _explain_unknown(key: str, values: Mapping[str, Any]) -> str:
    value, known = values[key], _known_keys(values)
    if isinstance(value, Mapping) and value:  # optimzer.lr=0.1: report full keys, so that full keys are suggested
        return "; ".join(unknown_key(f"{key}.{inner}", given, known) for inner, given in value.items())
    return unknown_key(key, value, known)


def _known_keys(values: Mapping[str, Any]) -> list[str]:
    """Return all dotted keys, including those of the named sections whose names are valid."""
    keys = [key for key in keys_of(Config) if key.partition(".")[0] not in NAMED_SECTIONS]
    for key, registry in NAMED_SECTIONS.items():
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
        config = OmegaConf.load(path)  # rejects duplicate keys, and aliases that expand without end
        if isinstance(config, DictConfig):
            with path.open(encoding="utf-8") as file:
                config = OmegaConf.create(yaml_values.read(file) or {})
    except FileNotFoundError:
        raise UserError(f"config {str(path)!r} does not exist; {_nearby(path)}") from None
    except (OSError, ValueError) as error:  # not UTF-8, or not a path
        raise UserError(f"config {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"config {str(path)!r} should be a mapping of keys to values")
    return config


def _nearby(path: Path) -> str:
    """Return a hint with the config files near a path, the most similar name first."""
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
