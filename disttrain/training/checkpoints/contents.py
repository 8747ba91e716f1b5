"""The contents of a checkpoint: collecting and loading them.

A checkpoint is a folder of safetensors and JSON files; nothing is pickled::

    step-00000100/
        manifest.json               progress, config, versions, sizes and sha256 of the other files, its own hash
        model.safetensors           parameters and buffers
        optimizer.safetensors       the optimizer's tensors, as "parameter/key"
        compression.safetensors     the compressor's state that is the same on all ranks
        average.safetensors         the moving average of the weights, if there is one
        best.safetensors            the best weights, if early stopping is to restore them
        rank-00000.safetensors      one per rank: its residuals, buffers and random generators
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from disttrain.comm import Communicator
from disttrain.comm.collective_errors import collective_errors
from disttrain.compression.whitening import PREFIX
from disttrain.errors import PeerLostError, UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.reduction.state import resharding
from disttrain.reduction.state.state_dict import state_dict
from disttrain.training.checkpoints.manifest import Manifest, rank_file
from disttrain.training.run import random_state

_RESIDUAL, _BUFFER, _RNG, _PENDING = "residual:", "buffer:", "rng:", "pending:"
_LOAD_ERRORS = (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)


@dataclass
class Contents:
    """What one rank writes.

    Attributes:
        files: live tensors, by file and by name.
        generators: the state of the random generators, as far as it is not tensors; JSON.
        facts: what the manifest says about the files.
    """

    files: dict[str, dict[str, torch.Tensor]]
    generators: str
    facts: dict[str, Any]

    @classmethod
    def collect(
        cls,
        comm: Communicator,
        model: nn.Module,
        optimizer: DistributedOptimizer,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        *,
        buffers: Mapping[str, torch.Tensor] | None = None,
        flush: bool = False,
    ) -> Contents:
        """Collect the current state. A collective.

        Args:
            comm, model, optimizer: of the run.
            tensors: further tensors by name, the same on all ranks, for the files ``<key>.safetensors``.
            buffers: this rank's own buffers.
            flush: replace every rank's residuals by their mean, which is then saved once.
        """
        flushed = resharding.average(optimizer.reducer.buckets, comm) if flush else {}
        compression = state_dict(optimizer.reducer.buckets, comm, copy=False)
        generators, rest = random_state.get_state(comm.device)
        own = {_RNG + name: tensor for name, tensor in generators.items()}
        own |= {_BUFFER + name: tensor for name, tensor in (buffers or {}).items()}
        if not flush:
            own |= {_RESIDUAL + name: tensor for name, tensor in compression["per_rank"].items()}
        files = {rank_file(comm.rank): own}
        optimizer_tensors, optimizer_values = _optimizer_state(optimizer, model)
        if comm.rank == 0:
            files["model.safetensors"] = _model_state(model)
            files["optimizer.safetensors"] = optimizer_tensors
            replicated = compression["replicated"]
            files["compression.safetensors"] = replicated | {_PENDING + name: one for name, one in flushed.items()}
            files |= {f"{part}.safetensors": dict(content) for part, content in tensors.items() if content}
        facts = {
            "world_size": comm.world_size,
            "optimizer": optimizer_values,
            "compression_step": compression["step"],
            "loss_scale": None if optimizer.loss_scale is None else optimizer.loss_scale.state_dict(),
        }
        return cls(files, rest, facts)

    def metadata(self, identity: dict[str, str]) -> dict[str, dict[str, str]]:
        """Return the header metadata of each file."""
        return {name: identity | ({"rng": self.generators} if name.startswith("rank-") else {}) for name in self.files}


def load(path: Path, manifest: Manifest, comm: Communicator, model: nn.Module, optimizer: DistributedOptimizer) -> bool:
    """Load the state of model, optimizer and compressor, and, on the same number of ranks, of the random generators.

    On another number of ranks, or where parameters have other owners, every rank gets the mean of the saved residuals.
    This preserves the mean over ranks, which is what the model has yet to receive. A collective.

    Hyperparameters (learning rate, momentum, ...) are not loaded: those of the config apply.

    Returns:
        Whether the random generators were restored. If not, the caller has to seed them.

    Raises:
        UserError: the checkpoint was saved with another model, optimizer or compressor.
    """
    same_world_size = manifest.world_size == comm.world_size
    with collective_errors(comm), load_errors(path):
        _load_model(path, model)
        replicated = load_file(path / "compression.safetensors")
        flushed = {name: replicated.pop(name) for name in list(replicated) if name.startswith(_PENDING)}
        own = _read(path / rank_file(comm.rank), _RESIDUAL) if same_world_size and not flushed else {}
    current = state_dict(optimizer.reducer.buckets, comm, copy=False)
    like = current["per_rank"]
    if flushed:
        mean = {name.removeprefix(_PENDING): tensor for name, tensor in flushed.items()}
        per_rank = resharding.distribute(mean, like)
    elif all(comm.all_gather_object(same_world_size and _sizes(own) == _sizes(like))):
        per_rank = own
    else:
        with collective_errors(comm), load_errors(path):
            ranks = range(comm.rank, manifest.world_size, comm.world_size)
            shards = {rank: _read(path / rank_file(rank), _RESIDUAL) for rank in ranks}
        per_rank = resharding.distribute(resharding.merge(shards, comm), like)
    if any(bucket.compressor.hierarchical for bucket in optimizer.reducer.buckets):
        if not _of_compressors(per_rank | replicated):  # saved on one node, which exchanges dense: no residuals
            per_rank, replicated = like | per_rank, current["replicated"] | replicated
        elif _of_compressors(per_rank) and not _of_compressors(like):
            raise UserError(
                f"checkpoint {str(path)!r} has residuals of several nodes, and a hierarchical exchange on one node "
                "keeps none: resume on more nodes, or with compressor.hierarchical=false"
            )
    with collective_errors(comm), load_errors(path):
        optimizer.load_state_dict(
            {
                "state": _restore_optimizer_state(path, manifest.optimizer, optimizer, model),
                "param_groups": optimizer.inner.state_dict()["param_groups"],
                "loss_scale": manifest.loss_scale,
                "compression": {
                    "rank": comm.rank,
                    "world_size": comm.world_size,
                    "step": manifest.compression_step,
                    "replicated": replicated,
                    "per_rank": per_rank,
                },
            }
        )
        if same_world_size:
            own_file = path / rank_file(comm.rank)
            with safe_open(own_file, framework="pt") as file:
                rest = file.metadata()["rng"]
            random_state.set_state(_read(own_file, _RNG), rest, comm.device)
    return same_world_size


def load_buffers(path: Path, rank: int) -> dict[str, torch.Tensor]:
    """Return the buffers that a rank has saved as its own."""
    return _read(path / rank_file(rank), _BUFFER)


def load_tensors(path: Path, manifest: Manifest, part: str) -> dict[str, torch.Tensor]:
    """Return the tensors in ``<part>.safetensors``; an empty dict if the checkpoint has no such file."""
    name = f"{part}.safetensors"
    return load_file(path / name) if name in manifest.files else {}


@contextlib.contextmanager
def load_errors(path: Path) -> Iterator[None]:
    """Turn errors of the block, which loads a checkpoint, into a one-line UserError about that checkpoint.

    Files that match the manifest may still come from an untrusted source.
    """
    try:
        yield
    except (UserError, PeerLostError, OSError):
        raise
    except _LOAD_ERRORS as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"checkpoint {str(path)!r} cannot be loaded into this run: {what}") from error


def _of_compressors(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that are not those of whitening."""
    return [name for name in state if not name.rpartition("/")[2].startswith(PREFIX)]


def _read(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names start with ``prefix``, under the rest of their names."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in tensors.items()}


def _model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers. A tensor that modules share is included once, under its first name."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"checkpoints hold only tensors, but {name!r} in the model's state dict is a {type(value).__name__}"
            )
        found.setdefault(id(value), (name, value.detach()))
    return dict(found.values())


def _load_model(path: Path, model: nn.Module) -> None:
    own = model.state_dict(keep_vars=True)
    found = load_file(path / "model.safetensors")
    shared = {id(own[name]) for name in found if name in own}
    missing = [name for name, value in own.items() if name not in found and id(value) not in shared]
    unexpected = [name for name in found if name not in own]
    wrong = [name for name in found if name in own and own[name].shape != found[name].shape]
    for problem, names in (("lacks", missing), ("also has", unexpected), ("has other shapes for", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"checkpoint {str(path)!r} was saved with another model: it {problem} {', '.join(names[:3])}{more}"
            )
    model.load_state_dict(found, strict=False)


def _parameter_names(optimizer: DistributedOptimizer, model: nn.Module) -> list[str]:
    """Return the parameters' names in the order in which a torch optimizer numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_state(
    optimizer: DistributedOptimizer, model: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state's tensors and its other values, both under "parameter/key"."""
    names = _parameter_names(optimizer, model)
    state = optimizer.inner.state_dict()["state"]
    flat = {f"{names[index]}/{key}": value for index, entry in state.items() for key, value in entry.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _restore_optimizer_state(
    path: Path, values: Mapping[str, Any], optimizer: DistributedOptimizer, model: nn.Module
) -> dict[int, dict[str, Any]]:
    parameters = dict(model.named_parameters())
    numbers = {name: index for index, name in enumerate(_parameter_names(optimizer, model))}
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**load_file(path / "optimizer.safetensors"), **values}.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in numbers:
            raise UserError(
                f"checkpoint {str(path)!r} has optimizer state for {parameter!r}, which this run does not train"
            )
        if isinstance(value, torch.Tensor) and value.shape not in ((), (1,), parameters[parameter].shape):
            raise UserError(
                f"checkpoint {str(path)!r} has {name!r} with shape {list(value.shape)}: the model has changed"
            )
        state.setdefault(numbers[parameter], {})[key] = value
    return state
