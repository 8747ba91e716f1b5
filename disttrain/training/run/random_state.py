"""Seeding, saving and restoring the global random generators of torch, NumPy and Python."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed all generators with a key of any number of integers."""
    entropy = (len(key), *key)  # NumPy ignores trailing zeros in a key
    torch_seed, numpy_seed, python_seed = (int(word) for word in np.random.SeedSequence(entropy).generate_state(3))
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)


def get_state(device: torch.device) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state as tensors, and JSON for everything else. Of GPUs, only ``device`` is included."""
    kind, key, position, has_gauss, gauss = np.random.get_state()
    assert kind == "MT19937"
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(key).astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors, json.dumps({"numpy": [position, has_gauss, gauss], "python": random.getstate()})


def set_state(tensors: Mapping[str, torch.Tensor], rest: str, device: torch.device) -> None:
    """Restore what ``get_state`` has returned."""
    values = json.loads(rest)
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *values["numpy"]))
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
