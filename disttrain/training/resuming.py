"""Whether a config can go on from a checkpoint: what must be as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disttrain.training.agreement import AgreedError
from disttrain.training.config import Config


def check_fits(path: Path, manifest: Mapping[str, Any], config: Config, num_samples: int) -> None:
    """Raise AgreedError if the checkpoint's optimizer is another, or its place in an epoch is not the same now."""
    saved, old = manifest["progress"], manifest["config"]
    optimizer = config.to_dict()["optimizer"]
    for key in ("name", "momentum_correction"):  # what the optimizer's state means
        was, now = old["optimizer"].get(key), optimizer.get(key)
        if was != now:
            message = f"optimizer.{key}={now!r}, but checkpoint {str(path)!r} was made with {was!r}: keep that"
            raise AgreedError(message)
    order = (old["seed"], saved["num_samples"])
    if saved["offset"] and order != (config.seed, num_samples):
        raise AgreedError(
            f"checkpoint {str(path)!r} lies within an epoch of seed={order[0]} and {order[1]} samples, now it is "
            f"{config.seed} and {num_samples}: keep them, or resume from an epoch's end"
        )
