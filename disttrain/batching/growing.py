"""Applies a batch policy: batch size, backward passes per step, and the gain of the learning rate."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from disttrain.batching.gradient_noise import GradientNoise
from disttrain.batching.micro_batch_limit import MemoryLimit, MicroBatchLimit
from disttrain.batching.policies import BatchPolicy, Fixed, PolicyInputs, registry
from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.reduction import SquaredNorms
from disttrain.reduction.measurements.norms import Every


class GrowingBatch:
    """The current batch of a run, which ``update`` may change after each step, in the same way on all ranks.

    In your own loop, with ``optimizer = DistributedOptimizer(..., norms_every=growing.norms_every)``::

        growing = GrowingBatch({"name": "noise_scale", "max_batch_size": 512}, comm, 64, len(data))
        while ...:
            ...                                          # growing.batch_size samples over all ranks
            optimizer.step()
            growing.update(loss / comm.world_size, num_samples, norms=optimizer.norms, step=step, epochs=epochs)
            rate.step(growing.gain)                      # a LearningRate

    Args:
        policy: A policy, its name, or a mapping as in a config: ``{"name": "plateau", "max_batch_size": 256}``.
        comm: The communicator.
        batch_size: Initial samples per optimizer step, over all ranks.
        num_samples: Samples per epoch. The batch grows no larger.
        accumulation: Backward passes per optimizer step at the start. Later steps take at least as many.

    Attributes:
        batch_size: Samples of the next step.
        accumulation: Backward passes of the next step.
        metrics: Metrics of the last step, for a log: "batch_size", and "gain" and "noise_scale" if there are any.
        gain: Factor on the learning rate in the next step.
        noise: The gradient noise measured so far.
        scale_invariant_steps: Sum of the gains of all steps that were not skipped: the equivalent number of steps with
            the reference batch.

    Raises:
        UserError: The policy does not fit the batch, or needs gradient noise where one process makes one backward pass
            per step.
    """

    def __init__(
        self,
        policy: BatchPolicy | str | Mapping[str, Any],
        comm: Communicator,
        batch_size: int,
        num_samples: int,
        accumulation: int = 1,
    ) -> None:
        self.policy = policy = registry.build(policy)
        policy.check(batch_size, None, None)
        self._comm, self._initial_size, self._min_accumulation = comm, batch_size, accumulation
        self._reference_size = policy.reference_size(batch_size)
        self._max_size = max(batch_size, min(policy.limit or 0, num_samples))
        self.noise = GradientNoise(policy.smoothing)
        self.gain, self.scale_invariant_steps = 1.0, 0.0
        self.metrics: dict[str, float] = {}
        self._loss = torch.zeros((), dtype=torch.float64, device=comm.device)  # of this rank and the current epoch
        self._num_losses = 0
        self._last_loss: float | None = None
        self._micro_batch_limit: MicroBatchLimit
        if policy.max_micro_batch == "auto":
            initial = math.ceil(batch_size / (comm.world_size * accumulation))
            self._micro_batch_limit = MemoryLimit(comm, initial, policy.memory_gib)
        else:
            self._micro_batch_limit = MicroBatchLimit(policy.max_micro_batch)
        self.resize(batch_size)
        if policy.measures_noise and comm.world_size * self.accumulation == 1:
            raise UserError(
                "the batch policy compares the gradients of parts of a batch: start 2 or more workers, "
                "or set accumulation=2"
            )

    @property
    def norms_every(self) -> Every | None:
        """The argument ``norms_every`` for the ``DistributedOptimizer``."""
        return (self.policy.measure_every or "auto") if self.policy.measures_noise else None

    def record_memory(self, model: torch.nn.Module, num_samples: int) -> contextlib.AbstractContextManager[None]:
        """Return a context for the forward and backward pass of ``num_samples`` samples of this rank.

        Required by ``max_micro_batch: auto``.
        """
        return self._micro_batch_limit.measure(model, num_samples)

    def resize(self, batch_size: int) -> None:
        """Change the batch size, and split it into the fewest passes within the limit that have equal sizes."""
        self.batch_size, limit = batch_size, self._micro_batch_limit.max_samples
        per_rank = math.ceil(batch_size / self._comm.world_size)
        fewest = max(self._min_accumulation, math.ceil(per_rank / limit) if limit else 1)
        even = (passes for passes in range(fewest, 2 * fewest) if batch_size % (passes * self._comm.world_size) == 0)
        self.accumulation = next(even, fewest)

    def update(
        self,
        loss: torch.Tensor,
        num_samples: int,
        *,
        sizes: Sequence[float] | None = None,
        norms: SquaredNorms | None = None,
        step: int,
        epochs: float,
        ends_epoch: bool = False,
        is_skipped: bool = False,
        is_sound: bool | None = None,
    ) -> bool:
        """Record a step and choose batch and gain of the next one. Losses and norms of a skipped step are ignored.

        Args:
            loss: This rank's part of the mean loss over the step's samples: the sum over ranks is the mean.
            num_samples: Samples of the step, over all ranks.
            sizes: Samples of each rank; in one process, of the first backward pass alone. None: all are equal.
            norms: ``optimizer.norms``, if the policy measures gradient noise.
            step: Optimizer steps so far.
            epochs: Epochs so far, including the fraction of the current one.
            ends_epoch: Whether this was the last step of an epoch.
            is_skipped: Whether the step was skipped.
            is_sound: Deprecated: ``not is_skipped``.

        Returns:
            Whether the batch size has changed.
        """
        if is_sound is not None:
            warnings.warn("GrowingBatch.update(is_sound=) is deprecated: use is_skipped", DeprecationWarning, 2)
            is_skipped = not is_sound
        self.metrics = {"batch_size": self.batch_size}
        if not isinstance(self.policy, Fixed) or self.policy.lr_scaling != "none":
            self.metrics["gain"] = self.gain
        self._micro_batch_limit.end_step()
        is_measured = False
        if not is_skipped:
            self.scale_invariant_steps += self.gain
            if self.policy.needs_losses:
                self._loss += loss.detach() * num_samples
                self._num_losses += num_samples
            if norms is not None:
                is_measured = self.noise.update(norms, sizes or self._equal_sizes(num_samples), num_samples)
        if self.noise.num_measured and math.isfinite(self.noise.scale):
            self.metrics["noise_scale"] = self.noise.scale
        losses = self._end_epoch() if ends_epoch and self.policy.needs_losses else None
        return self._apply_policy(step, epochs, losses, is_measured)

    def resume(self, step: int, epochs: float) -> None:
        """Choose batch and gain of the next step in a resumed run, after ``load_state_dict``.

        This repeats the choice of the saved run, unless the config has changed: another initial batch, limit or policy
        gives another batch and gain.
        """
        self._apply_policy(step, epochs, None, False)

    def go_on(self, step: int, epochs: float) -> None:
        """Deprecated name of ``resume``."""
        warnings.warn("GrowingBatch.go_on is deprecated: use resume", DeprecationWarning, stacklevel=2)
        self.resume(step, epochs)

    def _apply_policy(
        self, step: int, epochs: float, epoch_losses: tuple[float, float] | None, is_measured: bool
    ) -> bool:
        """Set batch size and gain by the policy, and return whether the batch size has changed."""
        inputs = PolicyInputs(
            batch_size=self.batch_size,
            initial_size=self._initial_size,
            step=step,
            epochs=epochs,
            epoch_losses=epoch_losses,
            noise=self.noise,
            is_measured=is_measured,
        )
        before, target = self.batch_size, self.policy.target_size(inputs)
        size = max(1, min(self._max_size, math.floor(target) if math.isfinite(target) else self._max_size))
        if size != before:
            self.resize(size)
            self._micro_batch_limit.restart()
        self.gain = self._lr_scale() * self.policy.lr_factor(target, self.batch_size)
        return self.batch_size != before

    def _equal_sizes(self, num_samples: int) -> list[float]:
        if self._comm.world_size == 1:
            return [num_samples / self.accumulation]
        return [num_samples / self._comm.world_size] * self._comm.world_size

    def _lr_scale(self) -> float:
        ratio = self.batch_size / self._reference_size
        match self.policy.lr_scaling:
            case "linear":
                return ratio
            case "sqrt":
                return math.sqrt(ratio)
            case "adascale":
                return self.noise.gain(self._reference_size, self.batch_size)
            case _:
                return 1.0

    def _end_epoch(self) -> tuple[float, float] | None:
        """Return the mean losses of the epoch that ends and of the one before it. Collective."""
        if not self._num_losses:
            return None  # every step was skipped
        loss = sum(self._gather_losses()) / self._num_losses
        self._loss, self._num_losses = torch.zeros_like(self._loss), 0
        previous, self._last_loss = self._last_loss, loss
        return None if previous is None else (loss, previous)

    def _gather_losses(self) -> list[float]:
        """Return the sum of losses of each rank, in rank order. Collective."""
        return [float(part) for part in self._comm.all_gather_object(self._loss.item())]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, equal on all ranks. Collective."""
        return {
            "initial": self._initial_size,
            "batch_size": self.batch_size,
            "gain": self.gain,
            "scale_invariant_steps": self.scale_invariant_steps,
            "noise": self.noise.state_dict(),
            "losses": self._gather_losses() if self.policy.needs_losses else [],
            "num_losses": self._num_losses,
            "last_loss": self._last_loss,
            "memory": self._micro_batch_limit.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, possibly on another number of ranks.

        If the initial batch size has changed, the batch is scaled by the growth of the saved one.
        """
        self._micro_batch_limit.load_state_dict(state.get("memory"))  # absent from older checkpoints
        grown = state["batch_size"] * self._initial_size // state["initial"]
        self.resize(max(1, min(grown, self._max_size)))
        self.gain, self.scale_invariant_steps = state["gain"], state["scale_invariant_steps"]
        self.noise.load_state_dict(state["noise"])
        losses = state["losses"]
        if losses and len(losses) != self._comm.world_size:  # only their sum matters
            losses = [sum(losses), *[0.0] * (self._comm.world_size - 1)]
        self._loss.fill_(losses[self._comm.rank] if losses else 0.0)
        self._num_losses, self._last_loss = (state["num_losses"] if losses else 0), state["last_loss"]
