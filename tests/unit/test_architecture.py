"""The rules of the package: imports point down and form no circles; files and packages stay small."""

from __future__ import annotations

import ast
import re
from collections import deque
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
MAX_LINES, MAX_MODULES, MIN_SENTENCES = 400, 12, 2
# Registries with one file per item, which may have any number of modules.
REGISTRIES = {"compression/algorithms"}


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


def module_name(path: Path) -> str:
    return ".".join(("disttrain", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which modules each module imports, wherever in the file and also under ``TYPE_CHECKING``.

    ``from package import name`` is an import of the package, or of the submodule if ``name`` is one.
    """
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = {f"{node.module}.{alias.name}": node.module for alias in node.names}
                found |= {name if name in sources else package for name, package in names.items()}
        graph[module] = (found & set(sources)) - {module}
    return graph


def find_circles(graph: dict[str, set[str]]) -> list[str]:
    """The shortest circle through each module that is on one, as ``a -> b -> a``; each circle once."""
    found = {}
    for start in sorted(graph):
        paths, seen = deque([[start]]), {start}
        while paths:
            path = paths.popleft()
            if start in graph[path[-1]]:
                found.setdefault(frozenset(path), " -> ".join([*path, start]))
                break
            for module in sorted(graph[path[-1]] - seen):
                seen.add(module)
                paths.append([*path, module])
    return list(found.values())


def test_no_circular_imports() -> None:
    circles = find_circles(import_graph({module_name(path): path.read_text() for path in FILES}))
    assert not circles, "circular imports:\n" + "\n".join(circles)


def test_find_circles_names_them() -> None:
    sources = {
        "p": "from p.a import f",
        "p.a": "def f():\n    from p import b",
        "p.b": "if TYPE_CHECKING:\n    from p.c import C",
        "p.c": "import p.a",
        "p.d": "from p import f",
    }
    assert find_circles(import_graph(sources)) == ["p.a -> p.b -> p.c -> p.a"]
    assert find_circles(import_graph({**sources, "p.c": "from p import f"})) == ["p -> p.a -> p.b -> p.c -> p"]
    assert find_circles(import_graph({**sources, "p.c": ""})) == []


def test_files_stay_small() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_packages_stay_small() -> None:
    folders = {path.parent for path in FILES}
    sizes = {str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py"))) - 1 for folder in folders}
    assert sizes.keys() > REGISTRIES
    assert not {folder: size for folder, size in sizes.items() if size > MAX_MODULES and folder not in REGISTRIES}


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_packages_say_what_they_are_for(folder: Path) -> None:
    assert (folder / "__init__.py").exists()
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    sentences = re.findall(r"[.!?](?=\s|$)", docstring)
    assert len(sentences) >= MIN_SENTENCES, f"{folder.name}/__init__.py: say in two sentences what is in the package"
