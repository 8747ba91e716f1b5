"""The ``disttrain`` command: training, and showing configs, machines and runs.

Each command that prints a table has its own file. ``app.py`` declares all commands and is quick to import.
"""

from __future__ import annotations

from disttrain.cli.app import main

__all__ = ["main"]
