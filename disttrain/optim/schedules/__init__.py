"""Learning-rate schedules by name.

``docs/recipe.md`` has the formulas. To add a schedule, write a class with a ``shape`` and list it here.
"""

from __future__ import annotations

from disttrain.optim.schedules.learning_rate import CLASSES, LearningRate, Schedule, schedules
from disttrain.optim.schedules.reduce_on_plateau import ReduceOnPlateau
from disttrain.optim.schedules.sequence import Sequential
from disttrain.optim.schedules.shapes import (
    Constant,
    Cosine,
    Exponential,
    InverseTime,
    Linear,
    MultiStep,
    OneCycle,
    Polynomial,
    Step,
)

__all__ = ["Constant", "Cosine", "LearningRate", "ReduceOnPlateau", "Schedule", "schedules"]

CLASSES.update(
    {
        "constant": Constant,
        "step": Step,
        "multi_step": MultiStep,
        "exponential": Exponential,
        "inverse_time": InverseTime,
        "cosine": Cosine,
        "linear": Linear,
        "polynomial": Polynomial,
        "one_cycle": OneCycle,
        "reduce_on_plateau": ReduceOnPlateau,
        "sequence": Sequential,
    }
)
