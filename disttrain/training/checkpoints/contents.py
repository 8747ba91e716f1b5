"""What a checkpoint holds, and taking it over. No pickle: tensors in safetensors, all else in JSON. One folder each::

step-00000100/
    manifest.json               progress, config, versions, sizes and sha256 of all other files, its own hash
    model.safetensors           parameters and buffers
    optimizer.safetensors       its tensors, as "parameter/key"
    compression.safetensors     the compressor's state that is equal on all ranks
    average.safetensors         the moving average of the weights, if there is one
    best.safetensors            the weights that early stopping would put back, if any
    rank-00000.safetensors      one a rank: its residuals, buffers and random generators
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
from disttrain.errors import PeerLostError, UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.reduction.state import resharding as pending
from disttrain.reduction.state.state_dict import state_dict
from disttrain.training.checkpoints.manifest import Manifest, rank_file
from disttrain.training.run import random_state

_RESIDUAL, _BUFFER, _RNG, _PENDING = "residual:", "buffer:", "rng:", "pending:"
_BREAKS = (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)


@dataclass
class Contents:
    """What a rank writes of this moment: live tensors by file and name, and what the manifest says of them."""

    files: dict[str, dict[str, torch.Tensor]]
    generators: str
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        comm: Communicator,
        model: nn.Module,
        optimizer: DistributedOptimizer,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        *,
        buffers: Mapping[str, torch.Tensor] | None = None,
        flush: bool = False,
    ) -> Contents:
        """``parts`` are further tensors, equal on all ranks, each for a file of its own; ``buffers`` this rank's own.

        ``flush``: every rank's residuals become the mean of all of them, which is then saved once. A collective.
        """
        flushed = pending.average(optimizer.reducer.buckets, comm) if flush else {}
        compression = state_dict(optimizer.reducer.buckets, comm, copy=False)
        generators, rest = random_state.get_state(comm.device)
        own = {_RNG + name: tensor for name, tensor in generators.items()}
        own |= {_BUFFER + name: tensor for name, tensor in (buffers or {}).items()}
        if not flush:
            own |= {_RESIDUAL + name: tensor for name, tensor in compression["per_rank"].items()}
        files = {rank_file(comm.rank): own}
        tensors, values = _optimizer_state(optimizer, model)
        if comm.rank == 0:
            files["model.safetensors"] = _model_state(model)
            files["optimizer.safetensors"] = tensors
            replicated = compression["replicated"]
            files["compression.safetensors"] = replicated | {_PENDING + name: one for name, one in flushed.items()}
            files |= {f"{part}.safetensors": dict(content) for part, content in parts.items() if content}
        facts = {
            "world_size": comm.world_size,
            "optimizer": values,
            "compression_step": compression["step"],
            "loss_scale": None if optimizer.loss_scale is None else optimizer.loss_scale.state_dict(),
        }
        return cls(files, rest, facts)

    def metadata(self, identity: dict[str, str]) -> dict[str, dict[str, str]]:
        """What goes into the header of each file."""
        return {name: identity | ({"rng": self.generators} if name.startswith("rank-") else {}) for name in self.files}


def load(path: Path, manifest: Manifest, comm: Communicator, model: nn.Module, optimizer: DistributedOptimizer) -> bool:
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
    as_many = manifest.world_size == comm.world_size
    with collective_errors(comm), damage(path):
        _load_model(path, model)
        replicated = load_file(path / "compression.safetensors")
        flushed = {name: replicated.pop(name) for name in list(replicated) if name.startswith(_PENDING)}
        own = _read(path / rank_file(comm.rank), _RESIDUAL) if as_many and not flushed else {}
    present = state_dict(optimizer.reducer.buckets, comm, copy=False)
    like = present["per_rank"]
    if flushed:
        whole = {name.removeprefix(_PENDING): tensor for name, tensor in flushed.items()}
        per_rank = pending.distribute(whole, like)
    elif all(comm.all_gather_object(as_many and _sizes(own) == _sizes(like))):
        per_rank = own
    else:
        with collective_errors(comm), damage(path):
            ranks = range(comm.rank, manifest.world_size, comm.world_size)
            shards = {rank: _read(path / rank_file(rank), _RESIDUAL) for rank in ranks}
        per_rank = pending.distribute(pending.merge(shards, comm), like)
    if any(bucket.compressor.hierarchical for bucket in optimizer.reducer.buckets):
        if not per_rank and not replicated:  # it was one node, which exchanges dense and owes nothing
            per_rank, replicated = like, present["replicated"]
        elif per_rank and not like:
            raise UserError(
                f"checkpoint {str(path)!r} has residuals of several nodes, and a hierarchical exchange on one node "
                "keeps none: resume on more nodes, or with compressor.hierarchical=false"
            )
    with collective_errors(comm), damage(path):
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
        if as_many:
            own_file = path / rank_file(comm.rank)
            with safe_open(own_file, framework="pt") as file:
                rest = file.metadata()["rng"]
            random_state.set_state(_read(own_file, _RNG), rest, comm.device)
    return as_many


def load_buffers(path: Path, rank: int) -> dict[str, torch.Tensor]:
    """A rank's own buffers, as saved."""
    return _read(path / rank_file(rank), _BUFFER)


def load_part(path: Path, manifest: Manifest, part: str) -> dict[str, torch.Tensor]:
    """The tensors that were saved as ``parts[part]``; none if there were none."""
    name = f"{part}.safetensors"
    return load_file(path / name) if name in manifest.files else {}


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """What breaks while a checkpoint is taken over is the checkpoint's fault: one line in place of a traceback.

    Its files may be what was written, and yet what was written may come from anybody.
    """
    try:
        yield
    except (UserError, PeerLostError, OSError):
        raise
    except _BREAKS as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"checkpoint {str(path)!r} does not hold what this run needs: {what}") from error


def _read(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no mapping
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in tensors.items()}


def _model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each once: of one that modules share, the first name."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"a checkpoint holds tensors only, and the model's {name!r} is a {type(value).__name__}")
        found.setdefault(id(value), (name, value.detach()))
    return dict(found.values())


def _load_model(path: Path, model: nn.Module) -> None:
    own = model.state_dict(keep_vars=True)
    found = load_file(path / "model.safetensors")
    shared = {id(own[name]) for name in found if name in own}
    missing = [name for name, value in own.items() if name not in found and id(value) not in shared]
    unexpected = [name for name in found if name not in own]
    wrong = [name for name in found if name in own and own[name].shape != found[name].shape]
    for problem, names in (("lacks", missing), ("also has", unexpected), ("has another shape of", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"checkpoint {str(path)!r} is of another model: it {problem} {', '.join(names[:3])}{more}")
    model.load_state_dict(found, strict=False)


def _parameter_names(optimizer: DistributedOptimizer, model: nn.Module) -> list[str]:
    """The parameters' names in the order in which a torch optimizer numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_state(
    optimizer: DistributedOptimizer, model: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and what JSON holds, both as "parameter/key"."""
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
            raise UserError(f"checkpoint {str(path)!r} has optimizer state of {parameter!r}, which is not trained now")
        if isinstance(value, torch.Tensor) and value.shape not in ((), (1,), parameters[parameter].shape):
            shape = list(value.shape)
            raise UserError(f"checkpoint {str(path)!r} has {name!r} in shape {shape}: the model has changed")
        state.setdefault(numbers[parameter], {})[key] = value
    return state
