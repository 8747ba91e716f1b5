"""The length of a run and the position in it, which schedules follow.

The batch may grow during a run, and a resumed run may have another batch or other data. So where epochs limit a run,
its length and position follow the data rather than the number of steps.
"""

from __future__ import annotations

from disttrain.batching import BatchPolicy
from disttrain.training.config import Config
from disttrain.training.run.progress import Progress


class RunLength:
    """The length of a run in steps of its initial batch.

    Where ``epochs`` limits the run, the position is the data seen so far in initial batches, so that a schedule ends
    with the data. Where ``max_steps`` does, it is the number of steps. Where both do, the larger position counts. With
    a constant batch, the position is always the number of optimizer steps. Under AdaScale it is the sum of the steps'
    gains.

    Args:
        policy: batch policy.
        batch_size: initial batch size, unless the policy has a reference of its own.
        num_samples: samples in an epoch.
        epochs, max_steps: limits; one may be None.
        drop_last: whether a smaller last step of an epoch is left out.

    Attributes:
        num_steps: length of the run.
        steps_per_epoch: steps of the initial batch in an epoch.
    """

    def __init__(
        self,
        policy: BatchPolicy,
        *,
        batch_size: int,
        num_samples: int,
        epochs: int | None,
        max_steps: int | None,
        drop_last: bool = False,
    ) -> None:
        self._unit, self._batch_size = policy.progress_unit, policy.reference_size(batch_size)
        self.steps_per_epoch = num_samples // self._batch_size if drop_last else -(-num_samples // self._batch_size)
        self._epochs, self._max_steps = epochs, max_steps
        limits = (max_steps, epochs and epochs * self.steps_per_epoch)
        self.num_steps = min(limit for limit in limits if limit is not None)

    @classmethod
    def from_config(cls, config: Config, num_samples: int) -> RunLength:
        """Return the length of the config's run, given the samples in an epoch."""
        return cls(
            config.batch,
            batch_size=config.batch_size,
            num_samples=num_samples,
            epochs=config.epochs,
            max_steps=config.max_steps,
            drop_last=config.drop_last,
        )

    @property
    def may_take_fewer_steps(self) -> bool:
        """Whether ``num_steps`` is only an upper limit of the number of optimizer steps."""
        return self._unit != "steps"

    def position(self, progress: Progress, scale_invariant_steps: float) -> float:
        """Return the position, from 0 to ``num_steps``."""
        if self._unit == "gains":
            return min(float(self.num_steps), scale_invariant_steps)
        done = [0.0]  # integer products come first, so that the division is exact with a constant batch
        if self._epochs is not None:
            by_data = progress.epoch * self.steps_per_epoch + progress.offset // self._batch_size
            done.append(by_data * self.num_steps / (self._epochs * self.steps_per_epoch))
        if self._max_steps is not None:
            done.append(progress.step * self.num_steps / self._max_steps)
        return min(float(self.num_steps), max(done))

    def is_over(self, progress: Progress, scale_invariant_steps: float) -> bool:
        """Whether the run has reached its end."""
        if self._unit == "gains":  # gains are at least 1, so a run takes more steps only if some were skipped
            return scale_invariant_steps >= self.num_steps - 1e-6 or progress.step >= self.num_steps
        by_epoch = self._epochs is not None and progress.epoch >= self._epochs
        return by_epoch or (self._max_steps is not None and progress.step >= self._max_steps)
