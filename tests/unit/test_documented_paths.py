"""Import paths that the documents named still work, with a warning where they have moved."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

# Documented path: where its object is now.
MOVED = {
    "disttrain.optim.thawing:Thawing": "disttrain.optim.layers.unfreezing:Unfreezing",
    "disttrain.training.interruption:ignore_signals": "disttrain.training.run.interruption:ignore_signals",
}
UNCHANGED = [
    "disttrain.comm:Watch",
    "disttrain.comm:simulate",
    "disttrain.compression.base:Bucket",
    "disttrain.compression.base:State",
    "disttrain.compression.codec:Codec",
    "disttrain.compression.codec:Payload",
    "disttrain.tasks:Task",
    "disttrain.tasks:TensorData",
]


def load(path: str) -> object:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old", MOVED)
def test_moved_paths_warn_and_name_the_new_one(old: str) -> None:
    sys.modules.pop(old.partition(":")[0], None)  # an import warns once a process
    new_module = MOVED[old].partition(":")[0]
    with pytest.warns(DeprecationWarning, match=new_module.replace(".", r"\.")):
        moved = load(old)
    assert moved is load(MOVED[old])


def test_moved_paths_work_without_an_import_of_their_own() -> None:
    """As ``disttrain.training.interruption.ignore_signals`` did, once ``disttrain.Interruption`` had been used."""
    code = (
        "import disttrain; disttrain.Interruption\n"
        "assert disttrain.training.interruption.ignore_signals.__module__ == 'disttrain.training.run.interruption'\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "DeprecationWarning: disttrain.training.interruption is now disttrain.training.run" in done.stderr


@pytest.mark.parametrize("path", UNCHANGED)
def test_documented_paths_are_there(path: str) -> None:
    assert load(path) is not None


def test_import_of_the_package_loads_none_of_them() -> None:
    code = "import sys, disttrain; sys.exit(' '.join(name for name in sys.modules if name.startswith('disttrain.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.split() == ["disttrain.errors"]
