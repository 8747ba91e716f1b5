"""A batch of constant size."""

from __future__ import annotations

from disttrain.batching.policies.base import BatchPolicy, PolicyInputs


class Fixed(BatchPolicy):
    """Keeps the run's ``batch_size``."""

    def target_size(self, inputs: PolicyInputs) -> float:
        return inputs.batch_size
