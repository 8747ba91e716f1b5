"""Carries a batch policy out: sizes, backward passes a step, the learning rate's gain, and what it goes by."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from disttrain.batching.gradient_noise import GradientNoise
from disttrain.batching.pass_memory import FixedLimit, PassMemory
from disttrain.batching.policies.base import BatchPolicy, PolicyInputs
from disttrain.batching.policies.fixed import Fixed
from disttrain.batching.policies.registry import registry
from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.reduction import SquaredNorms
from disttrain.reduction.measurements.norms import Every


class GrowingBatch:
    """The present batch of a run, which ``update`` may change after each step. All ranks decide alike.

    In a user's own loop, with ``optimizer = DistributedOptimizer(..., norms_every=growing.norms_every)``::

        growing = GrowingBatch({"name": "noise_scale", "max_batch_size": 512}, comm, 64, len(data))
        while ...:
            ...                                          # growing.batch_size samples over all ranks
            optimizer.step()
            growing.update(loss / comm.world_size, num_samples, norms=optimizer.norms, step=step, epochs=epochs)
            rate.step(growing.gain)                      # a LearningRate

    Args:
        policy: a policy, its name, or a mapping as in a config: ``{"name": "plateau", "max_batch_size": 256}``.
        comm: the ranks.
        batch_size: samples of an optimizer step over all ranks at the beginning.
        num_samples: of an epoch; the batch does not outgrow it.
        accumulation: backward passes an optimizer step at the beginning, and the fewest later.

    Attributes:
        batch_size: of the next step.
        accumulation: backward passes of the next step.
        metrics: of the last step, for a log: "batch_size", and "gain" and "noise_scale" where there are such.
        gain: what the learning rate is to be multiplied by in the next step.
        noise: of gradients, as measured so far.
        scale_invariant_steps: the sum of all sound steps' gains: so many steps of the reference batch the run is worth.

    Raises:
        UserError: the policy does not fit the batch, or has nothing to measure noise by, as a step is one backward pass
            of one process.
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
        self._comm, self._initial, self._fewest_passes = comm, batch_size, accumulation
        self._reference = policy.reference(batch_size)
        self._limit = max(batch_size, min(policy.limit or 0, num_samples))
        self.noise = GradientNoise(policy.smoothing)
        self.gain, self.scale_invariant_steps = 1.0, 0.0
        self.metrics: dict[str, float] = {}
        self._loss = torch.zeros((), dtype=torch.float64, device=comm.device)  # this rank's part, of the epoch so far
        self._num_losses = 0
        self._last_loss: float | None = None
        self._memory: PassMemory | FixedLimit
        if policy.max_micro_batch == "auto":
            begun_with = math.ceil(batch_size / (comm.world_size * accumulation))
            self._memory = PassMemory(comm, begun_with, policy.memory_gib)
        else:
            self._memory = FixedLimit(policy.max_micro_batch)
        self.resize(batch_size)
        if policy.measures_noise and comm.world_size * self.accumulation == 1:
            raise UserError(
                "the batch policy compares the gradients of parts of a batch: start 2 or more workers, "
                "or set accumulation=2"
            )

    @property
    def norms_every(self) -> Every | None:
        """What the ``DistributedOptimizer`` takes under this name."""
        return (self.policy.measure_every or "auto") if self.policy.measures_noise else None

    def record_memory(self, model: torch.nn.Module, num_samples: int) -> contextlib.AbstractContextManager[None]:
        """For ``max_micro_batch: auto``: forward and backward of a pass of so many samples of this rank go within."""
        return self._memory.watch(model, num_samples)

    def resize(self, batch_size: int) -> None:
        """Go on with another batch: the fewest passes that keep within ``max_micro_batch`` and split it evenly."""
        self.batch_size, largest = batch_size, self._memory.fitting
        of_a_rank = math.ceil(batch_size / self._comm.world_size)
        fewest = max(self._fewest_passes, math.ceil(of_a_rank / largest) if largest else 1)
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
        is_sound: bool = True,
    ) -> bool:
        """Note a step and choose the next one's batch and gain. Of a step that was skipped nothing is noted.

        Args:
            loss: this rank's part of the mean loss over the step's samples: the sum over ranks is that mean.
            num_samples: of the step, over all ranks.
            sizes: samples of each rank; in one process, of the first backward pass alone. None: all parts are alike.
            norms: ``optimizer.norms``, where the policy measures noise.
            step: optimizer steps done.
            epochs: epochs done, with the part of the present one.
            ends_epoch: whether this was the last step of an epoch.
            is_sound: whether the step was taken, and not skipped.

        Returns:
            Whether the batch size has changed.
        """
        self.metrics = {"batch_size": self.batch_size}
        if not isinstance(self.policy, Fixed) or self.policy.lr_scaling != "none":
            self.metrics["gain"] = self.gain
        self._memory.end_step()
        is_measured = False
        if is_sound:
            self.scale_invariant_steps += self.gain
            if self.policy.needs_losses:
                self._loss += loss.detach() * num_samples
                self._num_losses += num_samples
            is_measured = norms is not None and self.noise.update(norms, sizes or self._parts(num_samples), num_samples)
        if self.noise.num_measured and math.isfinite(self.noise.scale):
            self.metrics["noise_scale"] = self.noise.scale
        losses = self._end_epoch() if ends_epoch and self.policy.needs_losses else None
        return self._choose(step, epochs, losses, is_measured)

    def go_on(self, step: int, epochs: float) -> None:
        """Choose the next step's batch and gain in a run that goes on, after ``load_state_dict`` if it had this policy.

        Where nothing has changed that is the choice that the run had made. Where it goes on with another initial batch,
        another limit or another policy, the batch and its gain fit each other again.
        """
        self._choose(step, epochs, None, False)

    def _choose(self, step: int, epochs: float, epoch_losses: tuple[float, float] | None, is_measured: bool) -> bool:
        """Ask the policy, and carry it out; whether the batch size has changed."""
        situation = PolicyInputs(
            batch_size=self.batch_size,
            initial=self._initial,
            step=step,
            epochs=epochs,
            epoch_losses=epoch_losses,
            noise=self.noise,
            is_measured=is_measured,
        )
        before, target = self.batch_size, self.policy.target(situation)
        wanted = max(1, min(self._limit, math.floor(target) if math.isfinite(target) else self._limit))
        if wanted != before:
            self.resize(wanted)
            self._memory.begin()
        self.gain = self._scaling() * self.policy.cut(target, self.batch_size)
        return self.batch_size != before

    def _parts(self, num_samples: int) -> list[float]:
        if self._comm.world_size == 1:
            return [num_samples / self.accumulation]
        return [num_samples / self._comm.world_size] * self._comm.world_size

    def _scaling(self) -> float:
        ratio = self.batch_size / self._reference
        match self.policy.lr_scaling:
            case "linear":
                return ratio
            case "sqrt":
                return math.sqrt(ratio)
            case "adascale":
                return self.noise.gain(self._reference, self.batch_size)
            case _:
                return 1.0

    def _end_epoch(self) -> tuple[float, float] | None:
        """The mean losses of the epoch that ends and of the one before it. A collective."""
        if not self._num_losses:
            return None  # every step was skipped
        loss = sum(self._losses()) / self._num_losses
        self._loss, self._num_losses = torch.zeros_like(self._loss), 0
        before, self._last_loss = self._last_loss, loss
        return None if before is None else (loss, before)

    def _losses(self) -> list[float]:
        """Every rank's part, in rank order."""
        return [float(part) for part in self._comm.all_gather_object(self._loss.item())]

    def state_dict(self) -> dict[str, Any]:
        """All that a run must know to go on, as JSON values, equal on all ranks. A collective."""
        return {
            "initial": self._initial,
            "batch_size": self.batch_size,
            "gain": self.gain,
            "scale_invariant_steps": self.scale_invariant_steps,
            "noise": self.noise.state_dict(),
            "losses": self._losses() if self.policy.needs_losses else [],
            "num_losses": self._num_losses,
            "last_loss": self._last_loss,
            "memory": self._memory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, on as many ranks or another number.

        If the run began with another batch size, what counts is how many times it has grown since.
        """
        self._memory.load_state_dict(state.get("memory"))  # absent from older checkpoints
        grown = state["batch_size"] * self._initial // state["initial"]
        self.resize(max(1, min(grown, self._limit)))
        self.gain, self.scale_invariant_steps = state["gain"], state["scale_invariant_steps"]
        self.noise.load_state_dict(state["noise"])
        losses = state["losses"]
        if losses and len(losses) != self._comm.world_size:  # what counts is their sum
            losses = [sum(losses), *[0.0] * (self._comm.world_size - 1)]
        self._loss.fill_(losses[self._comm.rank] if losses else 0.0)
        self._num_losses, self._last_loss = (state["num_losses"] if losses else 0), state["last_loss"]
