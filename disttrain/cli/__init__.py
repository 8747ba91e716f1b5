"""The ``disttrain`` command: training, and commands that show what a config, a machine or a run holds.

One file per command that prints a table; ``app.py`` declares all of them and is quick to import.
"""

from __future__ import annotations

from disttrain.cli.app import main

__all__ = ["main"]
