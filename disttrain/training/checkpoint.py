"""Checkpoints that are whole or do not exist: written aside, fsynced, renamed; a manifest holds every file's hash.

No pickle: tensors in safetensors, all else in JSON. One folder a checkpoint::

    step-00000100/
        manifest.json               progress, config, sizes and sha256 of all other files
        model.safetensors           parameters and buffers
        optimizer.safetensors       its tensors, as "parameter/key"
        compression.safetensors     the compressor's state that is equal on all ranks
        average.safetensors         the moving average of the weights, if there is one
        best.safetensors            the weights that early stopping would put back, if any
        rank-00000.safetensors      one a rank: its residuals, and the states of its random generators
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.training import random_state
from disttrain.training.agreement import agreement
from disttrain.training.checkpoint_folder import publish, write_file

logger = logging.getLogger(__name__)

_RESIDUAL, _RNG = "residual:", "rng:"


def save(
    folder: Path,
    comm: Communicator,
    model: nn.Module,
    optimizer: DistributedOptimizer,
    *,
    step: int,
    progress: Mapping[str, Any],
    config: Mapping[str, Any],
    keep: int,
    parts: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Write ``folder/step-<step>`` together with the other ranks, then delete all but the newest ``keep``.

    ``progress`` and ``config`` are JSON values of the caller's, ``parts`` further tensors, equal on all ranks, each in
    a file of its own. All ranks must see the same ``folder``.

    Raises:
        UserError: it cannot be written, or the ranks do not share the file system.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    with agreement(comm):
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
            partial.mkdir(parents=True)
    state = optimizer.state_dict()
    compression = state["compression"]
    tensors, values = _optimizer_state(optimizer, model, state)
    written: dict[str, Any] = {}
    with agreement(comm):
        partial.mkdir(parents=True, exist_ok=True)
        generators, rest = random_state.get_state(comm.device)
        own = {_RESIDUAL + name: tensor for name, tensor in compression["per_rank"].items()}
        own |= {_RNG + name: tensor for name, tensor in generators.items()}
        name = _rank_file(comm.rank)
        written[name] = write_file(partial / name, own, {"rng": rest})
        if comm.rank == 0:
            written["model.safetensors"] = write_file(partial / "model.safetensors", model)
            written["optimizer.safetensors"] = write_file(partial / "optimizer.safetensors", tensors)
            replicated = compression["replicated"]
            written["compression.safetensors"] = write_file(partial / "compression.safetensors", replicated)
            for part, content in (parts or {}).items():
                if content:
                    written[f"{part}.safetensors"] = write_file(partial / f"{part}.safetensors", content)
    files = {name: entry for entries in comm.all_gather_object(written) for name, entry in entries.items()}
    manifest = {
        "step": step,
        "world_size": comm.world_size,
        "progress": progress,
        "config": config,
        "optimizer": values,
        "compression_step": compression["step"],
        "loss_scale": state.get("loss_scale"),
        "files": files,
    }
    with agreement(comm):
        if comm.rank == 0:
            if hidden := [name for name in files if not (partial / name).is_file()]:
                raise UserError(
                    f"{hidden[0]} was written to {str(folder)!r} on another host and is not visible on this one: "
                    "set output to a folder that all hosts share"
                )
            publish(partial, final, manifest, keep)
    return final


def load(
    path: Path, manifest: Mapping[str, Any], comm: Communicator, model: nn.Module, optimizer: DistributedOptimizer
) -> bool:
    """Take over model, optimizer and compressor state, and, on as many ranks as before, the random generators'.

    On another number of ranks, or where other ranks own the parameters, every rank gets the mean of the saved
    residuals, so that their mean over ranks, which is what the model has still to receive, stays what it was. All ranks
    must call this.

    Hyper-parameters (learning rate, momentum, ...) are not taken from the checkpoint: the config's count.

    Returns:
        Whether the random generators were restored; if not, the caller seeds them.

    Raises:
        UserError: the checkpoint is of another model, optimizer or compressor.
    """
    old_world_size: int = manifest["world_size"]
    own = path / _rank_file(comm.rank)
    with agreement(comm):
        try:
            load_model(model, str(path / "model.safetensors"))
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"checkpoint {str(path)!r} is of another model: {' '.join(str(error).split())}") from error
    like = optimizer.state_dict()["compression"]["per_rank"]
    per_rank = _read(own, _RESIDUAL) if old_world_size == comm.world_size else {}
    if not all(comm.all_gather_object(old_world_size == comm.world_size and _sizes(per_rank) == _sizes(like))):
        per_rank = _mean_residuals(path, old_world_size, comm, like)
    with agreement(comm):
        optimizer.load_state_dict(
            {
                "state": _restore_optimizer_state(path, manifest["optimizer"], optimizer, model),
                "param_groups": optimizer.state_dict()["param_groups"],
                "loss_scale": manifest.get("loss_scale"),
                "compression": {
                    "rank": comm.rank,
                    "world_size": comm.world_size,
                    "step": manifest["compression_step"],
                    "replicated": load_file(path / "compression.safetensors"),
                    "per_rank": per_rank,
                },
            }
        )
    if old_world_size != comm.world_size:
        return False
    with safe_open(own, framework="pt") as file:
        rest = file.metadata()["rng"]
    random_state.set_state(_read(own, _RNG), rest, comm.device)
    return True


def load_part(path: Path, manifest: Mapping[str, Any], part: str) -> dict[str, torch.Tensor]:
    """The tensors that ``save`` was given as ``parts[part]``; none if there were none."""
    name = f"{part}.safetensors"
    return load_file(path / name) if name in manifest["files"] else {}


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _read(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no mapping
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in tensors.items()}


def _mean_residuals(
    path: Path, old_world_size: int, comm: Communicator, like: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The mean over the saved shards that hold a residual; each rank reads its part of them.

    In a hierarchical exchange one rank of each node holds it, and the shards of the others have no elements of it. Nor
    does a rank get what it has no elements for in ``like``, its present state.
    """
    shards = [_read(path / _rank_file(rank), _RESIDUAL) for rank in range(comm.rank, old_world_size, comm.world_size)]
    held: dict[str, list[int]] = {}
    for some in comm.all_gather_object([_sizes(shard) for shard in shards]):
        for shard_sizes in some:
            for name, numel in shard_sizes.items():
                held.setdefault(name, []).extend([numel] if numel else [])
    means = {}
    for name, numels in sorted(held.items()):
        # In two stages each rank averages, and owes, a stretch of its own: there is nothing to take the mean of.
        if len(set(numels)) > 1 or name.endswith("/server_residual"):
            raise UserError(
                f"checkpoint {str(path)!r} was saved by {old_world_size} ranks, each with another piece of {name!r}: "
                "resume with as many"
            )
        total = torch.zeros(numels[0] if numels else 0, dtype=torch.float64, device=comm.device)
        for shard in shards:
            if name in shard and shard[name].numel():
                total += shard[name].to(comm.device)
        mean = comm.all_reduce(total) / max(1, len(numels))
        is_mine = name not in like or like[name].numel() > 0
        means[name] = (mean if is_mine else mean[:0]).to(like[name].dtype if name in like else torch.float32)
    if means and comm.rank == 0:
        logger.warning(
            "a checkpoint of %d ranks goes on with %d: every rank gets the mean of the saved residuals",
            old_world_size,
            comm.world_size,
        )
    return means


def _parameter_names(optimizer: DistributedOptimizer, model: nn.Module) -> list[str]:
    """The parameters' names in the order in which a torch optimizer numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_state(
    optimizer: DistributedOptimizer, model: nn.Module, state: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and what JSON holds, both as "parameter/key"."""
    names = _parameter_names(optimizer, model)
    flat = {f"{names[index]}/{key}": value for index, entry in state["state"].items() for key, value in entry.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _restore_optimizer_state(
    path: Path, values: Mapping[str, Any], optimizer: DistributedOptimizer, model: nn.Module
) -> dict[int, dict[str, Any]]:
    numbers = {name: index for index, name in enumerate(_parameter_names(optimizer, model))}
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**load_file(path / "optimizer.safetensors"), **values}.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in numbers:
            raise UserError(f"checkpoint {str(path)!r} has optimizer state of {parameter!r}, which is not trained now")
        state.setdefault(numbers[parameter], {})[key] = value
    return state
