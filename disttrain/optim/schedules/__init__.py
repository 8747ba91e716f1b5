"""Learning rates over a run, by name: a factor on the optimizer's own rate.

``docs/recipe.md`` has the formulas. One that is new is a class with a ``shape``, named here.
"""

from __future__ import annotations

from disttrain.optim.schedules.base import Schedule
from disttrain.optim.schedules.reduce_on_plateau import ReduceOnPlateau
from disttrain.optim.schedules.sequence import InSequence
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
from disttrain.validation import Registry

__all__ = ["Constant", "Cosine", "ReduceOnPlateau", "Schedule", "schedules"]

schedules: Registry[Schedule] = Registry(
    "schedule",
    Schedule,  # type: ignore[type-abstract]
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
        "sequence": InSequence,
    },
)
