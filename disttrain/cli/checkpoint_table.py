"""``disttrain checkpoints``: listing, verifying and deleting the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from disttrain.errors import UserError
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.training.checkpoints import manifest as checkpoint_manifest
from disttrain.training.checkpoints.folder import Best, checkpoints_in, prune, verified
from disttrain.training.checkpoints.manifest import Manifest
from disttrain.training.run import strict_json
from disttrain.validation import validate


def show(path: Path, console: Console, *, verify: bool = False, keep: int | None = None, as_json: bool = False) -> None:
    """Print a table, or JSON, of the checkpoints of a run.

    Args:
        path: the folder of a run, of its checkpoints, or of one checkpoint.
        console: where to print.
        verify: compare every byte with the manifest, not only names and sizes.
        keep: if given, delete all but the newest ``keep`` whose every byte is right, and the best.
        as_json: print JSON.

    Raises:
        UserError: there is no checkpoint, or none is complete.
    """
    paths = _paths(path)
    if keep is not None:
        if paths == [path]:
            raise UserError(f"--prune needs the folder of a run, and {str(path)!r} is a checkpoint")
        prune(paths[0].parent, keep, _best(_read_all(paths, verify=False)), thoroughly=True)
        paths = [path for path in paths if path.exists()]
    checkpoints = _read_all(paths, verify)
    best = _best(checkpoints)
    chosen = best and best.select([found for found in checkpoints.values() if isinstance(found, Manifest)])
    rows = [_row(path, found, found is chosen, verify) for path, found in checkpoints.items()]
    if as_json:
        print(strict_json.dumps(rows, indent=1))
    else:
        console.print(_table(rows, path))
    if all(isinstance(found, UserError) for found in checkpoints.values()):
        only = next(iter(checkpoints.values()))
        raise UserError(str(only) if len(rows) == 1 else f"no checkpoint in {path} is complete")


def _paths(path: Path) -> list[Path]:
    if (path / checkpoint_manifest.NAME).exists() or checkpoint_folder.is_checkpoint_name(path.name):
        if not path.is_dir():
            raise UserError(f"{str(path)!r} does not exist")
        return [path]
    for folder in (path / "checkpoints", path):
        if found := checkpoints_in(folder):
            return found
    raise UserError(f"{str(path)!r} holds no checkpoint: give the folder of a run or of a checkpoint")


def _read_all(paths: list[Path], verify: bool) -> dict[Path, Manifest | UserError]:
    """Return the manifest of each checkpoint, or what is wrong with it."""
    checkpoints: dict[Path, Manifest | UserError] = {}
    for path in paths:
        try:
            checkpoints[path] = verified(path).manifest if verify else checkpoint_manifest.read(path)
        except UserError as error:  # noqa: PERF203 - a handful of iterations
            checkpoints[path] = error
    return checkpoints


def _best(checkpoints: dict[Path, Manifest | UserError]) -> Best | None:
    """Return ``checkpoint.keep_best`` in the config of the newest complete checkpoint."""
    manifests = [found for found in checkpoints.values() if isinstance(found, Manifest)]
    section = manifests[-1].config.get("checkpoint") if manifests else None
    wanted = section.get("keep_best") if isinstance(section, dict) else None
    return validate(Best, wanted, "checkpoint.keep_best") if isinstance(wanted, dict) else None


def _row(path: Path, found: Manifest | UserError, is_best: bool, verify: bool) -> dict[str, Any]:
    if isinstance(found, UserError):
        problem = str(found).removeprefix(f"checkpoint {str(path)!r} ")
        return {"path": str(path), "step": None, "is_best": False, "problem": problem}
    return {
        "path": str(path),
        "step": found.step,
        "epoch": _epochs(found.progress),
        "date": found.date,
        "bytes": found.num_bytes,
        "world_size": found.world_size,
        "metrics": found.metrics,
        "versions": found.versions,
        "run": found.run,
        "is_best": is_best,
        "is_verified": verify,
        "problem": None,
    }


def _epochs(progress: dict[str, Any]) -> float | None:
    """Return the epochs done, including the fraction of the current one."""
    epoch, offset, num_samples = (progress.get(key) for key in ("epoch", "offset", "num_samples"))
    if not isinstance(epoch, int) or not isinstance(offset, int) or not isinstance(num_samples, int) or num_samples < 1:
        return None
    return round(epoch + offset / num_samples, 2)


def _table(rows: list[dict[str, Any]], path: Path) -> Table:
    table = Table(title=str(path))
    for column, justify in (("step", "right"), ("epoch", "right"), ("date (UTC)", "left"), ("MiB", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("workers", "metrics", "best", "state"):
        table.add_column(column, justify="right" if column == "workers" else "left")
    for row in rows:
        if row["problem"] is not None:
            table.add_row(Path(row["path"]).name.removeprefix("step-").lstrip("0"), *[""] * 6, escape(row["problem"]))
            continue
        metrics = escape("  ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items()))
        date = escape(row["date"][:19].replace("T", " "))
        state = "complete, every byte" if row["is_verified"] else "complete, by size"
        best = "best" if row["is_best"] else ""
        mib = f"{row['bytes'] / 2**20:.1f}"
        table.add_row(
            str(row["step"]),
            "" if row["epoch"] is None else f"{row['epoch']:g}",
            date,
            mib,
            str(row["world_size"]),
            metrics,
            best,
            state,
        )
    return table
