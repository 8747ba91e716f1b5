"""Registry of tasks: built-in ones by name, and users' own by import path.

A task's module is imported only when the task is used, so its libraries are not needed by other tasks.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from typing import Any

from pydantic import BaseModel

from disttrain.errors import UserError
from disttrain.tasks.base import Task, TensorData
from disttrain.tasks.paths import LocalPath
from disttrain.validation import Registry

__all__ = ["LocalPath", "Task", "TensorData", "registry"]

logger = logging.getLogger(__name__)

_PATHS = {
    "huggingface": "disttrain.tasks.huggingface:HuggingFace",
    "digits": "disttrain.tasks.digits:Digits",
    "text": "disttrain.tasks.text:Text",
}


def _load(name: str) -> type[Task] | None:
    path = _PATHS.get(name, name)
    if ":" not in path:
        if "." in path:
            module_path, _, cls = path.rpartition(".")
            raise UserError(f"task.name={name!r} must have a colon before the class: '{module_path}:{cls}'")
        return None
    module_name, _, class_name = path.partition(":")
    if os.getcwd() not in sys.path:  # unlike `python -m`, a console script does not search the current directory
        sys.path.insert(0, os.getcwd())
    try:
        if name not in _PATHS and module_name not in sys.modules:
            _announce(name, module_name.partition(".")[0])
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            where = f"no module {missing!r} in {os.getcwd()} (the current directory) or on PYTHONPATH"
        else:
            where = f"it imports {missing!r}, which is not installed"
        raise UserError(f"task.name={name!r}: {where}") from error
    except Exception as error:
        raise UserError(f"task.name={name!r}: importing {module_name} fails: {_one_line(error)}") from error
    found = getattr(module, class_name, None)
    tasks = [key for key, value in vars(module).items() if _is_task(value) and value.__module__ == module_name]
    if found is None:
        instead = f"; its tasks are: {', '.join(tasks)}" if tasks else ", and no other Task"
        raise UserError(f"task.name={name!r}: module {module_name} has no {class_name!r}{instead}")
    if not _is_task(found):
        raise UserError(f"task.name={name!r}: {class_name} must be a subclass of disttrain.tasks.Task")
    if abstract := sorted(found.__abstractmethods__):
        raise UserError(f"task.name={name!r}: {class_name} must define {', '.join(abstract)}")
    return found  # type: ignore[no-any-return]


def _announce(name: str, package: str) -> None:
    """Log whose code is about to run."""
    if spec := importlib.util.find_spec(package):
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        logger.info("task.name=%s runs code of %s", name, places[0] if places else package)


def _is_task(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Task) and value is not Task


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Tasks(Registry[Task]):
    """A registry whose names stand for import paths, which are imported on first use."""

    def names(self) -> list[str]:
        return sorted(_PATHS)

    def name_of(self, instance: BaseModel) -> str:
        path = super().name_of(instance)
        return next((name for name, listed in _PATHS.items() if listed == path), path)


registry = _Tasks("task", Task, {}, find=_load)  # type: ignore[type-abstract]
