"""Health checks: identical replicas, finite gradients, and compression that sends what it should.

Every decision depends on numbers that are the same on all ranks, so all ranks continue, exchange dense or end together.
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
from disttrain.training.monitoring.recorder import Recorder
from disttrain.validation import Section, validate

logger = logging.getLogger(__name__)

_SHOWN_SAMPLES = 8


class Health(Section):
    """What is checked, how often, and what happens when a check fails."""

    every: int | None = Field(
        default=1000, ge=1, description="steps between checks of checksums and residuals; null: no checks"
    )
    on_difference: Literal["end", "warn"] = Field(
        default="end", description="what to do when the ranks' parameters differ"
    )
    max_skipped: int | None = Field(
        default=20,
        ge=1,
        description="end after this many consecutive steps with a non-finite gradient; null: never",
    )
    cosine_every: int | None = Field(
        default=None, ge=1, description="steps between dense exchanges that compression is compared with; null: none"
    )
    min_cosine: float | None = Field(
        default=0.0,
        ge=-1,
        le=1,
        description="smallest allowed cosine between a layer's compressed and dense mean gradient; null: any",
    )
    max_residual: float | None = Field(
        default=1e4,
        gt=0,
        description="largest norm of a layer's residual, relative to its gradient's; null: any",
    )
    dense_steps: int = Field(
        default=100, ge=0, description="steps for which a layer outside these bounds is exchanged dense; 0: only warn"
    )


class _Saved(Section):
    """The state in a checkpoint."""

    skipped_in_a_row: int = Field(default=0, ge=0)
    dense_until: dict[str, int] = Field(default_factory=dict)


class Monitor:
    """Checks the health of a run. All ranks make one, and call ``after_step`` after every step.

    Attributes:
        consecutive_skipped: consecutive skipped steps that count towards ``max_skipped``. The optimizer's own count
            starts at 0 when a run is resumed, and includes steps after which the loss scale can still fall.
    """

    def __init__(self, health: Health, optimizer: DistributedOptimizer) -> None:
        self._health, self._optimizer, self._comm = health, optimizer, optimizer.comm
        self._meter = FidelityMeter(health.every, health.cosine_every, optimizer.reducer.executor)
        optimizer.reducer.meters.append(self._meter)
        self.consecutive_skipped = 0
        self._was_skipped = False

    def after_step(self, step: int, skipped: Sequence[int] | None, recorder: Recorder) -> None:
        """Check a step.

        Args:
            step: its number, starting at 1.
            skipped: this rank's samples, as indices into the data, if the step was skipped; otherwise None.
            recorder: where to record findings.

        Raises:
            UnhealthyError: continuing is of no use; on all ranks.
        """
        self._was_skipped = skipped is not None
        if skipped is None:
            self.consecutive_skipped = 0
        elif (scale := self._optimizer.loss_scale) is None or scale.is_exhausted:
            self._count_skipped(step, skipped, recorder)
        fidelity: Fidelity | None = self._optimizer.reducer.results.get(self._meter)
        if fidelity is not None:
            self._check_fidelity(step, fidelity, recorder)
        if self._health.every is not None and step % self._health.every == 0:
            self._compare_replicas(step, recorder)

    def check_loss(self, step: int, loss: float, recorder: Recorder) -> None:
        """Check the mean loss of the last step."""
        if not math.isfinite(loss) and not self._was_skipped:
            logger.warning("step %d: the loss is %g, but all gradients are finite: check the task's loss", step, loss)
            recorder.log_event(step, {"event": "loss", "loss": str(loss)})

    def _count_skipped(self, step: int, skipped: Sequence[int], recorder: Recorder) -> None:
        self.consecutive_skipped += 1
        own = None if bool(self._optimizer.reducer.is_finite_here) else list(skipped)
        samples = {rank: its for rank, its in enumerate(self._comm.all_gather_object(own)) if its is not None}
        recorder.log_event(step, {"event": "skipped", "in_a_row": self.consecutive_skipped, "samples": samples})
        if self.consecutive_skipped == self._health.max_skipped:
            rank, its = next(iter(samples.items()))
            more = ", ..." if len(its) > _SHOWN_SAMPLES else ""
            raise UnhealthyError(
                f"step {step} is the last of {self.consecutive_skipped} consecutive steps with a non-finite gradient, "
                f"on {_ranks(list(samples))}; samples of rank {rank}: "
                f"{', '.join(map(str, its[:_SHOWN_SAMPLES]))}{more} (metrics.jsonl lists all): check them, lower "
                "optimizer.lr, or set health.max_skipped"
            )

    def _check_fidelity(self, step: int, fidelity: Fidelity, recorder: Recorder) -> None:
        measured = {"residual": fidelity.residual, "cosine": fidelity.cosine}
        recorder.log_health(
            step, {f"{kind}/{name}": value for kind, values in measured.items() for name, value in values.items()}
        )
        low, high = self._health.min_cosine, self._health.max_residual
        found = {
            name: f"its compressed mean has cosine {value:.3f} with the dense mean, below health.min_cosine={low:g}"
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
            remedy = f"; its bucket is exchanged dense for {self._health.dense_steps} steps"
            for name in names:
                logger.warning("step %d: %s: %s%s", step, name, found[name], remedy if self._health.dense_steps else "")
                recorder.log_event(step, {"event": "compression", "layer": name, "what": found[name]})

    def _compare_replicas(self, step: int, recorder: Recorder) -> None:
        difference = first_difference(replicated_tensors(self._optimizer), self._comm)
        if difference is None:
            return
        recorder.log_event(step, {"event": "difference", "tensor": difference.tensor, "ranks": difference.ranks})
        message = (
            f"step {step}: {difference.tensor} on {_ranks(difference.ranks)} differs from the other ranks: resume from "
            "a checkpoint, on other hardware if it happens again"
        )
        if self._health.on_difference == "end":
            raise UnhealthyError(message)
        logger.warning("%s", message)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        buckets = self._optimizer.reducer.buckets
        dense_until = {
            name: bucket.state.dense_until
            for bucket in buckets
            for name in bucket.description.names
            if bucket.state.dense_until > bucket.state.step
        }
        return _Saved(skipped_in_a_row=self.consecutive_skipped, dense_until=dense_until).model_dump()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, after that of the optimizer.

        Raises:
            UserError: a key or value is invalid.
        """
        saved = validate(_Saved, state, "health")
        self.consecutive_skipped = saved.skipped_in_a_row
        for bucket in self._optimizer.reducer.buckets:
            bucket.state.dense_until = max(saved.dense_until.get(name, 0) for name in bucket.description.names)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
