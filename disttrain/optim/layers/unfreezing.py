"""Gradual unfreezing: parameters that a rule freezes ``until_step`` are trained from that step on.

Which parameters are frozen depends on the step alone, so a resumed run has the same set. Howard and Ruder (2018,
arXiv:1801.06146) unfreeze one layer at a time from the head down.
"""

from __future__ import annotations

import logging
import warnings

from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.optim.layers.groups import Layers

logger = logging.getLogger(__name__)


class Unfreezing:
    """Unfreezes parameters when they are due. In your own loop, on all ranks::

        layers = Layers(rules=[{"match": "body.*", "freeze": True, "until_step": 500}])
        layers.freeze(model)
        optimizer = DistributedOptimizer(torch.optim.AdamW(layers.groups(model, lr=1e-3)), model, comm=comm)
        unfreezing = Unfreezing(layers, optimizer)
        for step, batch in enumerate(batches):
            unfreezing.unfreeze_due(step)
            ...

    A run that resumes after ``n`` steps calls ``unfreeze_due(n - 1)`` before it loads its state.

    Args:
        layers: The rules.
        optimizer: An optimizer over ``layers.groups(model, ...)``, wrapped after ``layers.freeze(model)``.
        num_steps: Length of the run, if known.

    Raises:
        UserError: The ``until_step`` of a rule is after the end of the run.
    """

    def __init__(self, layers: Layers, optimizer: DistributedOptimizer, num_steps: int | None = None) -> None:
        self._optimizer = optimizer
        self._due = sorted(layers.unfreezing(optimizer.model).items())
        if self._due and num_steps is not None and self._due[-1][0] >= num_steps:
            raise UserError(
                f"layers.rules: until_step={self._due[-1][0]} is never reached, the run has {num_steps} steps, counted "
                "from 0: lower it, or remove it to freeze throughout"
            )

    def unfreeze_due(self, step: int) -> None:
        """Unfreeze the parameters that are trained at step ``step``, counted from 0.

        Do not call it between ``backward`` and ``step``.
        """
        while self._due and self._due[0][0] <= step:
            until_step, parameters = self._due.pop(0)
            self._optimizer.unfreeze(parameters)
            num_elements = sum(parameter.numel() for parameter in parameters)
            logger.info("unfroze parameters with %d elements at step %d", num_elements, until_step)

    def reach(self, step: int) -> None:
        """Deprecated name of ``unfreeze_due``."""
        warnings.warn("Unfreezing.reach is deprecated: use unfreeze_due", DeprecationWarning, stacklevel=2)
        self.unfreeze_due(step)
