"""Begin with the weights of another model: read them from local files, match them by name, say what did not match.

Nothing is unpickled: safetensors, or torch files read with ``weights_only=True``.
"""

from __future__ import annotations

import difflib
import json
import logging
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from disttrain.comm import Communicator
from disttrain.comm.collective_errors import collective_errors
from disttrain.errors import UserError
from disttrain.optim.replicas.synchronization import broadcast_model, check_has_values
from disttrain.tasks.paths import resolve
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.validation import Section

logger = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Under these keys programs keep a state dict among other things."""
_SHOWN = 4


class StartFrom(Section):
    """The config's ``start_from:`` section. A run that is resumed goes on from its own checkpoint instead."""

    weights: str = Field(
        description="a .safetensors file, a torch state dict, or a folder: of a run, a checkpoint, model.safetensors"
    )
    reset: tuple[str, ...] = Field(
        default=(), description="shell patterns of names not to be loaded: a new head, say 'head.*', stays fresh"
    )
    rename: dict[str, str] = Field(
        default={}, description="beginnings of names in the file, and what they are in the model: {'module.': ''}"
    )
    strict: bool = Field(default=True, description="refuse what does not match and is not reset; else only report it")

    def load(self, model: nn.Module, comm: Communicator) -> None:
        """Load on rank 0, give to all ranks. The file has to be on rank 0's host alone.

        Raises:
            AgreedError: as ``load_weights``, on all ranks.
        """
        with collective_errors(comm):
            if comm.rank == 0:
                load_weights(model, self.weights, reset=self.reset, rename=self.rename, strict=self.strict)
        broadcast_model(model, comm)


@dataclass
class Match:
    """How the tensors of a file and of a model fit together, by the model's names.

    Attributes:
        loaded: taken from the file.
        reset: left fresh because a pattern says so.
        missing: of the model, and not in the file.
        unexpected: in the file, and not of the model.
        misshaped: in both, with what each is: ``"float32 [10, 4] in the file, float32 [3, 4] in the model"``.
    """

    loaded: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> str:
        """What does not match, on one line; empty if all does."""
        shaped = [f"{name} ({shapes})" for name, shapes in self.misshaped.items()]
        parts = {"not in the file": self.missing, "not in the model": self.unexpected, "of another shape": shaped}
        return "; ".join(f"{what}: {_some(names)}" for what, names in parts.items() if names)


@torch.no_grad()
def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    reset: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
) -> Match:
    """Copy weights from local files into a model, by name. What does not match is logged, or an error.

    In a script of your own call it before ``DistributedOptimizer``, which gives rank 0's weights to all ranks.

    Args:
        model: its parameters and buffers are overwritten, keeping their dtype and device.
        path: a ``.safetensors`` file; a torch file with a state dict; the folder of a run or of a checkpoint (the
            weights that the run's result is of: the best, the averaged, or the last); a folder with
            ``model.safetensors`` or ``pytorch_model.bin``, in one piece or several. ``package:name/folder`` lies in an
            installed package.
        reset: shell patterns of names that keep what they are in ``model``, whatever the file has; or are only in the
            file, and are left there.
        rename: how names in the file begin, and what stands there in the model. The longest beginning counts.
        strict: what is missing, unexpected or of another shape, and not reset, is an error.

    Returns:
        What was loaded and what was not.

    Raises:
        UserError: the file cannot be read, or matches nothing; a pattern of ``reset`` or ``rename`` matches nothing;
            names or shapes do not match and ``strict`` is set; the model has parameters without values yet. The model
            is as it was then.
    """
    check_has_values(model)
    found = _rename(read_weights(Path(path)), rename or {}, path)
    own = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)
    }
    for pattern in reset:
        if not any(fnmatchcase(name, pattern) for name in (*own, *found)):
            nearest = difflib.get_close_matches(pattern, own, n=1, cutoff=0.0)[0]
            raise UserError(f"reset pattern {pattern!r} matches no parameter; the nearest name is {nearest!r}")
    match = _match(found, own, reset)
    if not match.loaded:
        advice = _advice(found, own)
        raise UserError(
            f"weights {str(path)!r} have nothing of the model: the file has {_some(found)}, the model "
            f"{_some(own)}{advice and f'; {advice}'}"
        )
    if match.problems and strict:
        raise UserError(
            f"weights {str(path)!r} do not fit the model; {match.problems}: name what should stay fresh under reset, "
            "change the beginnings of names with rename, or set strict to false"
        )
    for name in match.loaded:
        own[name].copy_(found[name])
    logger.info("%d of the model's %d tensors are from %r", len(match.loaded), len(own), str(path))
    if match.reset:
        logger.info("left fresh: %s", _some(match.reset))
    if match.problems:
        logger.warning("weights %r do not fit all of the model; %s", str(path), match.problems)
    return match


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file or folder as ``load_weights`` takes them, on the CPU.

    Raises:
        UserError: there is none, or it is damaged, or holds other things than tensors.
    """
    path = Path(resolve(str(path), "weights"))
    if not path.exists():
        raise UserError(f"weights {str(path)!r} do not exist")
    if not path.is_dir():
        return _read_file(path)
    checkpoint = checkpoint_folder.newest(path / "checkpoints") or checkpoint_folder.newest(path)
    if checkpoint is None and (path / "manifest.json").is_file():
        checkpoint = checkpoint_folder.verified(path)
    if checkpoint is not None:
        weights = _read_file(checkpoint.path / "model.safetensors")
        better = next((n for n in ("best", "average") if f"{n}.safetensors" in checkpoint.manifest.files), None)
        logger.info("taking the %s weights of %s", better or "last", checkpoint.path)
        chosen = _read_file(checkpoint.path / f"{better}.safetensors") if better else {}
        return {name: tensor for name, tensor in weights.items() if name not in chosen} | chosen
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _read_file(path / name)
        if (index := path / f"{name}.index.json").is_file():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"weights {str(index)!r} cannot be read: no weight_map of names to files") from error
            return {key: tensor for file in files for key, tensor in _read_file(path / file).items()}
    raise UserError(
        f"weights {str(path)!r}: the folder has no whole checkpoint, model.safetensors or pytorch_model.bin"
    )


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"weights {str(path)!r} cannot be read: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights {str(path)!r} hold more than tensors, or are no torch file: save model.state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"weights {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    while isinstance(content, Mapping) and (key := next((key for key in _WRAPPERS if key in content), None)):
        if not isinstance(content[key], Mapping):
            break
        content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"weights {str(path)!r} hold no state dict: save model.state_dict()")
    return tensors


def _rename(found: dict[str, torch.Tensor], rename: Mapping[str, str], path: str | Path) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    used = set()
    for name, tensor in found.items():
        old = max((old for old in rename if name.startswith(old)), key=len, default=None)
        used.add(old)
        renamed[name if old is None else rename[old] + name.removeprefix(old)] = tensor
    if idle := [old for old in rename if old not in used]:
        raise UserError(f"rename {idle[0]!r}: no name in weights {str(path)!r} begins so; they are {_some(found)}")
    if len(renamed) < len(found):
        raise UserError(f"rename {dict(rename)} gives two tensors of weights {str(path)!r} the same name")
    return renamed


def _match(found: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], reset: Sequence[str]) -> Match:
    match = Match()
    shared = {id(own[name]) for name in own if name in found}  # modules that share a tensor need it once
    for name, tensor in own.items():
        if _any_matches(name, reset):
            match.reset.append(name)
        elif name not in found:
            if id(tensor) not in shared:
                match.missing.append(name)
        elif _kind(tensor) != _kind(found[name]):
            match.misshaped[name] = f"{_describe(found[name])} in the file, {_describe(tensor)} in the model"
        else:
            match.loaded.append(name)
    match.loaded.sort(key=list(found).index)  # of a tensor with several names the last counts
    match.unexpected = [name for name in found if name not in own and not _any_matches(name, reset)]
    return match


def _any_matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _kind(tensor: torch.Tensor) -> tuple[bool, torch.Size]:
    return tensor.is_floating_point(), tensor.shape


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _advice(found: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """The renaming that would match most names, if one does."""
    choices: Counter[tuple[str, str]] = Counter()
    for theirs, mine in ((theirs, mine) for theirs in found for mine in own):
        for longer, shorter, rename in ((theirs, mine, True), (mine, theirs, False)):
            prefix = longer.removesuffix(shorter)
            if prefix.endswith(".") and prefix + shorter == longer:
                choices[(prefix, "") if rename else ("", prefix)] += 1
    if not choices:
        return ""
    (old, new), count = choices.most_common(1)[0]
    return f"rename: {{{old!r}: {new!r}}} would match {count}"
