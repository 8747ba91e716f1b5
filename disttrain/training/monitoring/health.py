"""The run's numbers under watch: are replicas alike, gradients finite, does compression still send what it should?

Every decision is taken from numbers that all ranks share, so all of them go on, turn dense or end alike.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from disttrain.errors import UnhealthyError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.optim.replicas.comparison import first_difference, replicated_tensors
from disttrain.reduction.measurements.fidelity import Fidelity, FidelityMeter
from disttrain.training.monitoring.recorder import NullRecorder, Recorder
from disttrain.validation import Section, validate

logger = logging.getLogger(__name__)

_SHOWN_SAMPLES = 8


class Health(Section):
    """What is looked at, how often, and what is done about it."""

    every: int | None = Field(
        default=1000, ge=1, description="steps between two looks at checksums and residuals; null: none"
    )
    on_difference: Literal["end", "warn"] = Field(
        default="end", description="what to do when ranks no longer have the same parameters"
    )
    max_skipped: int | None = Field(
        default=20, ge=1, description="end after so many steps in a row with an inf or NaN in a gradient; null: go on"
    )
    cosine_every: int | None = Field(
        default=None, ge=1, description="steps between two dense exchanges to compare compression with; null: none"
    )
    min_cosine: float | None = Field(
        default=0.0, ge=-1, le=1, description="least cosine between a layer's compressed and dense mean; null: any"
    )
    max_residual: float | None = Field(
        default=1e4, gt=0, description="largest norm of a layer's residual, in norms of its gradient; null: any"
    )
    dense_steps: int = Field(
        default=100, ge=0, description="steps for which a layer beyond these bounds is sent dense; 0: only warn"
    )


class _Saved(Section):
    """What a checkpoint keeps."""

    skipped_in_a_row: int = Field(default=0, ge=0)
    dense_until: dict[str, int] = Field(default_factory=dict)


class Monitor:
    """Looks after a run as its config says. All ranks make it, and call ``step`` after every step.

    Attributes:
        skipped_in_a_row: steps up to the present one that count against ``max_skipped``.
    """

    def __init__(self, health: Health, optimizer: DistributedOptimizer) -> None:
        self._health, self._optimizer, self._comm = health, optimizer, optimizer.comm
        self._meter = FidelityMeter(health.every, health.cosine_every, optimizer.wire, optimizer.comm)
        optimizer.reducer.meters.append(self._meter)
        self.skipped_in_a_row = 0
        self._was_sound = True

    def step(self, step: int, skipped: Sequence[int] | None, recorder: Recorder | NullRecorder) -> None:
        """Look at step ``step``, from 1.

        Args:
            step: its number.
            skipped: this rank's samples, as indices into the data, if the step was skipped; else None.
            recorder: where to note what is found.

        Raises:
            UnhealthyError: there is no use in going on; on all ranks alike.
        """
        self._was_sound = skipped is None
        if skipped is None:
            self.skipped_in_a_row = 0
        elif (scale := self._optimizer.loss_scale) is None or scale.is_exhausted:
            self._note_skipped(step, skipped, recorder)
        fidelity: Fidelity | None = self._optimizer.reducer.results.get(self._meter)
        if fidelity is not None:
            self._note_fidelity(step, fidelity, recorder)
        if self._health.every is not None and step % self._health.every == 0:
            self._compare(step, recorder)

    def loss(self, step: int, loss: float, recorder: Recorder | NullRecorder) -> None:
        """Look at the mean loss of a step, where it is known."""
        if not math.isfinite(loss) and self._was_sound:
            logger.warning(
                "step %d: the loss is %g though all gradients are finite: look at the task's loss", step, loss
            )
            recorder.event(step, {"event": "loss", "loss": str(loss)})

    def _note_skipped(self, step: int, skipped: Sequence[int], recorder: Recorder | NullRecorder) -> None:
        self.skipped_in_a_row += 1
        own = None if bool(self._optimizer.reducer.is_finite_here) else list(skipped)
        samples = {rank: its for rank, its in enumerate(self._comm.all_gather_object(own)) if its is not None}
        recorder.event(step, {"event": "skipped", "in_a_row": self.skipped_in_a_row, "samples": samples})
        if self.skipped_in_a_row == self._health.max_skipped:
            rank, its = next(iter(samples.items()))
            more = ", ..." if len(its) > _SHOWN_SAMPLES else ""
            raise UnhealthyError(
                f"step {step} is the last of {self.skipped_in_a_row} in a row with an inf or NaN in a gradient, on "
                f"{_ranks(list(samples))}; of rank {rank}, samples {', '.join(map(str, its[:_SHOWN_SAMPLES]))}{more} "
                "(metrics.jsonl has all): look at them, lower optimizer.lr, or set health.max_skipped"
            )

    def _note_fidelity(self, step: int, fidelity: Fidelity, recorder: Recorder | NullRecorder) -> None:
        measured = {"residual": fidelity.residual, "cosine": fidelity.cosine}
        recorder.health(
            step, {f"{kind}/{name}": value for kind, its in measured.items() for name, value in its.items()}
        )
        low, high = self._health.min_cosine, self._health.max_residual
        found = {
            name: f"its compressed mean has cosine {value:.3f} to the dense one, below health.min_cosine={low:g}"
            for name, value in fidelity.cosine.items()
            if low is not None and not value >= low
        }
        for name, value in fidelity.residual.items():
            if high is not None and not value <= high:
                found[name] = f"its residual is {value:.3g} times its gradient, above health.max_residual={high:g}"
        for bucket in self._optimizer.reducer.buckets:
            names = [name for name in bucket.description.names if name in found]
            if not names:
                continue
            bucket.exchange_dense(self._health.dense_steps)
            done = f"; it and what shares its bucket is sent dense for {self._health.dense_steps} steps"
            for name in names:
                logger.warning("step %d: %s: %s%s", step, name, found[name], done if self._health.dense_steps else "")
                recorder.event(step, {"event": "compression", "layer": name, "what": found[name]})

    def _compare(self, step: int, recorder: Recorder | NullRecorder) -> None:
        difference = first_difference(replicated_tensors(self._optimizer), self._comm)
        if difference is None:
            return
        recorder.event(step, {"event": "difference", "tensor": difference.tensor, "ranks": difference.ranks})
        message = (
            f"step {step}: {difference.tensor} is not the same on {_ranks(difference.ranks)} as on the others: "
            "go on from a checkpoint, on other hardware if it happens again"
        )
        if self._health.on_difference == "end":
            raise UnhealthyError(message)
        logger.warning("%s", message)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know; what JSON can hold."""
        buckets = self._optimizer.reducer.buckets
        dense_until = {
            name: bucket.state.dense_until
            for bucket in buckets
            for name in bucket.description.names
            if bucket.state.dense_until > bucket.state.step
        }
        return _Saved(skipped_in_a_row=self.skipped_in_a_row, dense_until=dense_until).model_dump()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, after the optimizer's own state.

        Raises:
            UserError: it is nothing of the kind.
        """
        saved = validate(_Saved, state_dict, "health")
        self.skipped_in_a_row = saved.skipped_in_a_row
        for bucket in self._optimizer.reducer.buckets:
            bucket.state.dense_until = max(saved.dense_until.get(name, 0) for name in bucket.description.names)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
