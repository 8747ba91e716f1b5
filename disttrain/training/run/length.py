"""How long a run is, and where it stands: what schedules count where the batch, and so the number of steps, changes.

The batch may grow in a run, and a run may go on with another batch or other data than it began with. So where epochs
bound a run, its length and its position follow the data; the number of steps that it took says nothing about either.
"""

from __future__ import annotations

from disttrain.batching import BatchPolicy
from disttrain.training.config import Config
from disttrain.training.run.progress import Progress


class RunLength:
    """A run of so many epochs or steps, in steps of its initial batch.

    Where ``epochs`` bounds the run, a position is the number of initial batches that the data seen so far would have
    made, so a schedule follows the data and ends with it; where ``max_steps`` bounds it, that of steps; of both,
    whichever is further. While the batch stays as it is, that is always the number of optimizer steps. Under AdaScale
    it is the sum of the steps' gains.

    Args:
        policy: of the batch.
        batch_size: the initial one; that of the policy's reference counts.
        num_samples: of an epoch.
        epochs, max_steps: the bounds; one may be None.
        drop_last: whether a smaller last step of an epoch is left out.

    Attributes:
        num_steps: the run's length, for schedules and the progress bar.
        steps_per_epoch: of the initial batch.
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
        self._clock, self._batch_size = policy.progress_unit, policy.reference_size(batch_size)
        self.steps_per_epoch = num_samples // self._batch_size if drop_last else -(-num_samples // self._batch_size)
        self._epochs, self._max_steps = epochs, max_steps
        limits = (max_steps, epochs and epochs * self.steps_per_epoch)
        self.num_steps = min(limit for limit in limits if limit is not None)

    @classmethod
    def of(cls, config: Config, num_samples: int) -> RunLength:
        """That of a run over so many samples."""
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
        """Whether ``num_steps`` is no more than a bound on the number of optimizer steps."""
        return self._clock != "steps"

    def position(self, progress: Progress, scale_invariant_steps: float) -> float:
        """Where the run stands, from 0 to ``num_steps``."""
        if self._clock == "gains":
            return min(float(self.num_steps), scale_invariant_steps)
        done = [0.0]  # products first: integers, so a division by num_steps leaves exactly the steps
        if self._epochs is not None:
            by_data = progress.epoch * self.steps_per_epoch + progress.offset // self._batch_size
            done.append(by_data * self.num_steps / (self._epochs * self.steps_per_epoch))
        if self._max_steps is not None:
            done.append(progress.step * self.num_steps / self._max_steps)
        return min(float(self.num_steps), max(done))

    def is_over(self, progress: Progress, scale_invariant_steps: float) -> bool:
        """Whether the run has come to its end."""
        if self._clock == "gains":  # they are 1 at least, so more steps than the base run's were skipped ones
            return scale_invariant_steps >= self.num_steps - 1e-6 or progress.step >= self.num_steps
        by_epoch = self._epochs is not None and progress.epoch >= self._epochs
        return by_epoch or (self._max_steps is not None and progress.step >= self._max_steps)
