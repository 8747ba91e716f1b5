"""The global random generators of torch, numpy and Python, which models and data use: seed, save, restore."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed all of them from all the numbers of the key."""
    entropy = (len(key), *key)  # numpy takes a key and the same key with zeros behind it for one
    torch_seed, numpy_seed, python_seed = (int(word) for word in np.random.SeedSequence(entropy).generate_state(3))
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)


def get_state(device: torch.device) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors, and JSON for the rest. Of GPUs, only the one given."""
    kind, key, position, has_gauss, gauss = np.random.get_state()
    assert kind == "MT19937"
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(key).astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors, json.dumps({"numpy": [position, has_gauss, gauss], "python": random.getstate()})


def set_state(tensors: Mapping[str, torch.Tensor], rest: str, device: torch.device) -> None:
    """Take over what ``get_state`` gave."""
    values = json.loads(rest)
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *values["numpy"]))
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
