"""Gradual unfreezing: parameters that rules freeze ``until_step`` are trained from that step on.

What is frozen is a function of the step alone, so that a run that goes on has the same set (Howard and Ruder 2018,
arXiv:1801.06146, unfreeze a layer at a time from the head down).
"""

from __future__ import annotations

import logging

from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.optim.layers.groups import Layers

logger = logging.getLogger(__name__)


class Unfreezing:
    """Unfreezes what is due. In a user's own loop, on all ranks::

        layers = Layers(rules=[{"match": "body.*", "freeze": True, "until_step": 500}])
        layers.freeze(model)
        optimizer = DistributedOptimizer(torch.optim.AdamW(layers.groups(model, lr=1e-3)), model, comm=comm)
        thawing = Thawing(layers, optimizer)
        for step, batch in enumerate(batches):
            thawing.reach(step)
            ...

    A run that goes on after ``n`` steps calls ``reach(n - 1)`` before it loads its state.

    Args:
        layers: with the rules.
        optimizer: over ``layers.groups(model, ...)``, after ``layers.freeze(model)``.
        num_steps: of the whole run, if known.

    Raises:
        UserError: a rule's ``until_step`` is not within the run.
    """

    def __init__(self, layers: Layers, optimizer: DistributedOptimizer, num_steps: int | None = None) -> None:
        self._optimizer = optimizer
        self._due = sorted(layers.unfreezing(optimizer.model).items())
        if self._due and num_steps is not None and self._due[-1][0] >= num_steps:
            raise UserError(
                f"layers.rules: until_step={self._due[-1][0]} comes after the run's {num_steps} steps, counted from 0: "
                "lower it, or leave it out to freeze for good"
            )

    def reach(self, step: int) -> None:
        """Thaw what step ``step``, counted from 0, and those before it are to train. Not between backward and step."""
        while self._due and self._due[0][0] <= step:
            until, parameters = self._due.pop(0)
            self._optimizer.unfreeze(parameters)
            logger.info("from step %d on %d more parameters are trained", until, sum(p.numel() for p in parameters))
