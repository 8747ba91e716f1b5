"""Imports point down only: read from the source, so that no one has to remember it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "disttrain"
# From top to bottom. Parts of one layer do not import each other, except where they share a name here.
LAYERS: list[list[set[str]]] = [
    [{"cli", "__main__"}],
    [{"training", "tasks"}],
    [{"optim"}, {"batching"}],
    [{"reduction"}],
    [{"comm"}, {"compression"}],
    [{"kernels"}, {"collectives", "validation", "errors"}],
]
OPTIONAL = {
    "horovod": "comm/engines/horovod.py",
    "mpi4py": "comm/engines/mpi.py",
    "triton": "kernels/cuda/",
    "numba": "kernels/cpu/",
    "transformers": "tasks/huggingface.py",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "disttrain" and len(parts) > 1 else None


def position(part: str) -> tuple[int, int]:
    return next(
        (depth, index) for depth, layer in enumerate(LAYERS) for index, group in enumerate(layer) if part in group
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the public names
    depth, group = position(own)
    known = {part for layer in LAYERS for names in layer for part in names}
    for module in imports(path):
        part = part_of(module)
        if part is None or part not in known:
            continue
        other_depth, other_group = position(part)
        assert other_depth > depth or (other_depth, other_group) == (depth, group), f"{relative} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_engines_are_imported_in_their_own_file_only(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    for module in imports(path):
        home = OPTIONAL.get(module.split(".")[0])
        assert home is None or relative.startswith(home), f"{relative} imports {module}"


def test_every_part_has_a_layer() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    known = {part for layer in LAYERS for group in layer for part in group}
    assert parts <= known, parts - known


def test_files_stay_small() -> None:
    long = {str(path.relative_to(PACKAGE)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
