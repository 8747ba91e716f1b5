"""The config of a run: its sections, and how it is read from YAML and overrides.

Sections of exchangeable parts (tasks, compressors, schedules) are defined beside these parts.
"""

from __future__ import annotations

from disttrain.training.config.schema import Checkpoint, Config, Evaluation, from_dict, load

__all__ = ["Checkpoint", "Config", "Evaluation", "from_dict", "load"]
