"""The config of a run: its sections, and loading it from YAML and overrides.

The sections of exchangeable parts (tasks, compressors, schedules) are defined next to those parts.
"""

from __future__ import annotations

from disttrain.training.config.loading import from_dict, load
from disttrain.training.config.schema import Checkpoint, Config, Evaluation

__all__ = ["Checkpoint", "Config", "Evaluation", "from_dict", "load"]
