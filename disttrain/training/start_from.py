"""Starting from the weights of another model: reading local files, and matching their tensors by name.

Files are safetensors, or torch files that are read with ``weights_only=True``.
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
"""Keys under which programs save a state dict."""
_SHOWN = 4


class StartFrom(Section):
    """The config's ``start_from:`` section. A resumed run uses its own checkpoint instead."""

    weights: str = Field(
        description="a .safetensors file, a torch state dict, or a folder: of a run, a checkpoint, model.safetensors"
    )
    reset: tuple[str, ...] = Field(
        default=(), description="shell patterns of names not to load, such as 'head.*' for a new head"
    )
    rename: dict[str, str] = Field(
        default={}, description="prefixes of names in the file, and their replacements in the model: {'module.': ''}"
    )
    strict: bool = Field(default=True, description="reject names that do not match and are not reset, or only warn")

    def load(self, model: nn.Module, comm: Communicator) -> None:
        """Load the weights on rank 0, whose host alone needs the file, and broadcast them. A collective.

        Raises:
            CollectiveError: as ``load_weights``, on all ranks.
        """
        with collective_errors(comm):
            if comm.rank == 0:
                load_weights(model, self.weights, reset=self.reset, rename=self.rename, strict=self.strict)
        broadcast_model(model, comm)


@dataclass
class Match:
    """How the tensors of a file match those of a model, by the model's names.

    Attributes:
        loaded: loaded from the file.
        reset: not loaded, because a pattern of ``reset`` matches.
        missing: in the model only.
        unexpected: in the file only.
        misshaped: in both, with the shapes: ``"float32 [10, 4] in the file, float32 [3, 4] in the model"``.
    """

    loaded: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> str:
        """All mismatches in one line; empty if there are none."""
        shaped = [f"{name} ({shapes})" for name, shapes in self.misshaped.items()]
        parts = {"not in the file": self.missing, "not in the model": self.unexpected, "with another shape": shaped}
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
    """Copy weights from local files into a model, by name. Log mismatches, or raise.

    In your own script, call this before making a ``DistributedOptimizer``, which broadcasts rank 0's weights.

    Args:
        model: its parameters and buffers are overwritten, keeping their dtype and device.
        path: a ``.safetensors`` file; a torch file with a state dict; the folder of a run or a checkpoint (its best
            weights if there are any, otherwise the averaged ones, otherwise the last); a folder with
            ``model.safetensors`` or ``pytorch_model.bin``, possibly sharded. ``package:name/folder`` is in an installed
            package.
        reset: shell patterns of names that are not loaded, in the model or in the file.
        rename: prefixes of names in the file, and their replacements in the model. The longest matching prefix counts.
        strict: raise if a tensor that is not reset is missing, unexpected or of another shape.

    Returns:
        What was loaded and what was not.

    Raises:
        UserError: the file cannot be read or matches nothing; a pattern of ``reset`` or ``rename`` matches nothing;
            names or shapes do not match and ``strict`` is set; the model has parameters without values yet. The model
            is unchanged.
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
            f"weights {str(path)!r} match nothing in the model: the file has {_some(found)}, the model has "
            f"{_some(own)}{advice and f'; {advice}'}"
        )
    if match.problems and strict:
        raise UserError(
            f"weights {str(path)!r} do not match the model; {match.problems}: list what not to load under reset, "
            "change prefixes with rename, or set strict to false"
        )
    for name in match.loaded:
        own[name].copy_(found[name])
    logger.info("loaded %d of the model's %d tensors from %r", len(match.loaded), len(own), str(path))
    if match.reset:
        logger.info("not loaded: %s", _some(match.reset))
    if match.problems:
        logger.warning("weights %r match only a part of the model; %s", str(path), match.problems)
    return match


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in a file or folder that ``load_weights`` accepts, on the CPU.

    Raises:
        UserError: it does not exist, is damaged, or does not hold only tensors.
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
        logger.info("using the %s weights in %s", better or "last", checkpoint.path)
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
        f"weights {str(path)!r}: the folder has no complete checkpoint, model.safetensors or pytorch_model.bin"
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
            f"weights {str(path)!r} hold more than tensors, or are not a torch file: save only model.state_dict()"
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
        raise UserError(f"rename {idle[0]!r}: no name in weights {str(path)!r} has this prefix: {_some(found)}")
    if len(renamed) < len(found):
        raise UserError(f"rename {dict(rename)} gives two tensors of weights {str(path)!r} the same name")
    return renamed


def _match(found: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], reset: Sequence[str]) -> Match:
    match = Match()
    shared = {id(own[name]) for name in own if name in found}  # a tensor that modules share needs only one name
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
    match.loaded.sort(key=list(found).index)  # for a tensor with several names, the last one counts
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
    """Return advice on the renaming that would match most names, if there is any."""
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
