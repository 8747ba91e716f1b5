"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from disttrain.batching import GrowingBatch
from disttrain.comm import Communicator
from disttrain.comm.collective_errors import collective_errors
from disttrain.optim.averaging import NoAverage
from disttrain.optim.layers.unfreezing import Unfreezing
from disttrain.optim.model_buffers import ModelBuffers
from disttrain.optim.optimizers.layerwise import trust_ratios
from disttrain.optim.schedules.learning_rate import LearningRate
from disttrain.training import setup
from disttrain.training.checkpoints.checkpointer import AverageState, Checkpointer
from disttrain.training.checkpoints.compatibility import changes_since, check_fits, is_same_batch_policy
from disttrain.training.checkpoints.contents import load_errors
from disttrain.training.checkpoints.folder import StoredCheckpoint
from disttrain.training.config import Config
from disttrain.training.data.loading import check_loader_workers, num_samples_of, to_device, train_batches
from disttrain.training.data.sampler import Share
from disttrain.training.monitoring.display import Display
from disttrain.training.monitoring.early_stopping import EarlyStopper, Stopper
from disttrain.training.monitoring.evaluation import Evaluator
from disttrain.training.monitoring.health import Monitor
from disttrain.training.monitoring.plateau import build_feedback
from disttrain.training.monitoring.recorder import Recorder
from disttrain.training.monitoring.trackers import JSONLines, TensorBoard, Tracker
from disttrain.training.precision import autocast
from disttrain.training.run.directory import RunDirectory, open_run_directory
from disttrain.training.run.interruption import Interruption
from disttrain.training.run.length import RunLength
from disttrain.training.run.progress import WIRE, Progress, WireTotals
from disttrain.training.run.random_state import seed_everything

logger = logging.getLogger(__name__)


class Trainer:
    """One rank's part of a run. All ranks construct it, call ``run``, and ``close`` it.

    Args:
        config: of the run.
        comm: the ranks.
        console: where rank 0 shows progress. Default: the standard output.
        trackers: where rank 0 sends records, in addition to ``metrics.jsonl`` and TensorBoard.

    Raises:
        UserError: the config does not fit the workers, the data or the checkpoint; on all ranks.
    """

    def __init__(
        self, config: Config, comm: Communicator, console: Console | None = None, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.config, self.comm, self.task = config, comm, config.task
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        # The order matters. What may fail on a single rank comes first, in a block without collectives. Sizes are
        # compared before anything is derived from them. Everything that has state exists before the run is resumed.
        with collective_errors(comm):
            self._set_up_process()
            self._set_up_model_and_data()
        with collective_errors(comm):
            setup.check_same_data(self.progress.num_samples, self.evaluator.num_samples, comm)
            self._set_up_batches()
            self._set_up_optimizer()
            setup.check_metrics(config, self.rate_feedback.metric, self.evaluator)
        comm.activity.enter("resuming", 0)
        self.interruption = Interruption(self.optimizer)
        self._open_directory()
        self._resume()
        self._open_recorder(console, trackers)

    def _set_up_process(self) -> None:
        config, comm = self.config, self.comm
        config.check_world_size(comm.world_size)
        if config.loader_workers:
            check_loader_workers()
        setup.set_up_torch(comm, config.num_threads, config.deterministic)

    def _set_up_model_and_data(self) -> None:
        self.model = setup.build_seeded_model(self.config, self.comm)
        self.train_data = self.task.train_data()
        self.evaluator = Evaluator(self.config, self.model, self.comm)
        self.progress = Progress(num_samples=num_samples_of(self.train_data))

    def _set_up_batches(self) -> None:
        config, num_samples = self.config, self.progress.num_samples
        self.batch = GrowingBatch(config.batch, self.comm, config.batch_size, num_samples, config.accumulation)
        self.sampler = setup.build_sampler(config, self.comm, num_samples, self.batch.accumulation)
        self.run_length = RunLength.from_config(config, num_samples)
        config.schedule.check(self.run_length.num_steps, self.run_length.steps_per_epoch)

    def _set_up_optimizer(self) -> None:
        """Make the optimizer, and everything that follows or steers it."""
        config, num_steps = self.config, self.run_length.num_steps
        self.optimizer = setup.build_optimizer(config, self.model, self.comm, self.batch)
        self.wire = WireTotals(self.optimizer.wire)
        self.health = Monitor(config.health, self.optimizer)
        self.unfreezing = Unfreezing(config.layers, self.optimizer, num_steps)
        self.average = config.average.build(self.optimizer) if config.average else NoAverage()
        self.buffers = ModelBuffers(self.optimizer, self.average)
        self.learning_rate = LearningRate(
            self.optimizer,
            config.schedule,
            num_steps,
            steps_per_epoch=self.run_length.steps_per_epoch,
            scale=config.optimizer.scale(config.batch_size),
        )
        self.rate_feedback = build_feedback(config.schedule, self.learning_rate, self.comm)
        self.stopper = EarlyStopper(config.early_stopping) if config.early_stopping else Stopper()

    def _open_directory(self) -> None:
        """Open the run's directory. If it has no checkpoint to resume from, load the weights to start from."""
        config, start_from = self.config, self.config.start_from
        if start_from is not None and config.resume == "never":
            start_from.load(self.model, self.comm)  # first, as opening renames an earlier run, which may hold them
        self.directory: RunDirectory = open_run_directory(config, self.comm)
        if start_from is not None and config.resume != "never" and self.directory.checkpoint is None:
            start_from.load(self.model, self.comm)
        elif start_from is not None and self.directory.checkpoint is not None:
            logger.info("start_from is not used: the run is resumed from %s", self.directory.checkpoint.path)

    def _resume(self) -> None:
        """Load the checkpoint to resume from, if any, and seed the random generators if that does not restore them."""
        self.checkpointer = Checkpointer(self.config, self.directory, self.optimizer, self.buffers)
        self.checkpointer.register(
            progress=self.progress,
            wire=self.wire,
            learning_rate=self.rate_feedback,
            batch=self.batch,
            health=self.health,
            average=AverageState(self.average),
            best=self.stopper,
        )
        checkpoint = self.directory.checkpoint
        if checkpoint is None or not self._load(checkpoint):
            seed_everything(self.config.seed, self.comm.rank, self.progress.step)  # dropout should differ by rank
        self._metrics: dict[str, float] = {}
        self._evaluated_at: int | None = None
        self._logged = (self.progress.samples, self.progress.step_seconds)

    def _load(self, checkpoint: StoredCheckpoint) -> bool:
        """Load a checkpoint. Return whether that restored the random generators."""
        path, manifest = checkpoint
        with collective_errors(self.comm), load_errors(path):
            check_fits(checkpoint, self.config, self.sampler.num_samples)
            skip = () if is_same_batch_policy(manifest, self.config) else ("batch",)
        self.unfreezing.unfreeze_due(manifest.step - 1)  # first, as the optimizer has state for what it trains
        is_restored = self.checkpointer.resume(checkpoint, skip)
        progress, sampler, batch = self.progress, self.sampler, self.batch
        with collective_errors(self.comm), load_errors(path):
            batch.resume(progress.step, progress.epochs)
            sampler.epoch, sampler.offset = progress.epoch, progress.offset
            sampler.resize(batch.batch_size, batch.accumulation)
            progress.epoch, progress.offset = sampler.epoch, sampler.offset
        logger.info("resuming from %s: step %d, %.2f epochs", path, progress.step, progress.epochs)
        for change in changes_since(manifest, self.comm.world_size, batch.batch_size):
            logger.info("%s", change)
        return is_restored

    def _open_recorder(self, console: Console | None, trackers: Sequence[Tracker]) -> None:
        self.recorder = Recorder()
        if self.comm.rank == 0:
            directory, step, num_steps = self.directory.path, self.progress.step, self.run_length.num_steps
            # The length is no number of optimizer steps if the batch grows, or had another size before.
            is_estimate = self.run_length.may_take_fewer_steps or self._position != step
            display = Display(console or Console(), directory, step, num_steps, self._position if is_estimate else None)
            self.recorder = Recorder([JSONLines(directory, step), TensorBoard(directory, step), *trackers, display])

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluating and saving as the config says. Return the summary, the same on all ranks.

        A signal to any rank ends the run after the current step, with a checkpoint if the config enables them.
        """
        with self.interruption:
            started = time.perf_counter() - self.progress.seconds
            for share, batches in self._steps():
                self._train_and_record(share, batches)
                if self._has_ended or self.config.evaluation.is_due(self.progress):
                    self.evaluate()
                self.progress.seconds = time.perf_counter() - started
                is_last = self._has_ended or self.interruption.requested
                if self.config.checkpoint.enabled and (is_last or self.config.checkpoint.is_due(self.progress)):
                    self.save()
                if is_last:
                    break
            return self._finish(started)

    def _steps(self) -> Iterator[tuple[Share, Iterator[Any]]]:
        """Yield each step from the position to the end of the run, with an iterator over its batches."""
        self.model.train()
        if self._has_ended:
            return
        while True:
            batches = train_batches(self.config, self.train_data, self.sampler, self.comm)
            for share in self.sampler.shares():
                size = self.sampler.batch_size
                yield share, batches
                if self.sampler.batch_size != size:
                    break  # the loader has read ahead in batches of the old size, so start a new one at the position

    def _train_and_record(self, share: Share, batches: Iterator[Any]) -> None:
        progress, started = self.progress, time.perf_counter()
        skipped_before = self.optimizer.skipped_steps
        loss = self.train_step(share, batches)
        self._advance(share, loss, is_skipped=self.optimizer.skipped_steps > skipped_before)
        if self._has_ended or progress.step % self.config.log_every == 0:
            self._log(self.comm.all_reduce(loss).item(), time.perf_counter() - started)
        progress.step_seconds += time.perf_counter() - started
        self.recorder.show_position(self._position)

    def train_step(self, share: Share, batches: Iterator[Any]) -> torch.Tensor:
        """Take one optimizer step. Return this rank's part of the mean loss over the step's samples, 0-d float64."""
        activity, num_passes = self.comm.activity, len(share.micro_batches)
        activity.begin_step(self.progress.step + 1)
        self.unfreezing.unfreeze_due(self.progress.step)
        self.optimizer.zero_grad()
        mean_loss = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        is_weighted = False
        for index, (start, stop) in enumerate(share.micro_batches):
            if start == stop:
                continue  # the last step of an epoch has too few samples for all ranks
            activity.enter("data loading")
            batch = to_device(next(batches), self.comm.device, self.dtype)
            activity.enter("forward and backward")
            is_last = index == num_passes - 1
            with (
                self.batch.record_memory(self.model, stop - start),
                contextlib.nullcontext() if is_last else self.optimizer.no_sync(),
            ):
                loss, weight, is_weighted = self._backward(batch, (stop - start) / share.num_samples)
                if index == 0 and not is_last:
                    self.optimizer.measure_first_pass()
            mean_loss += loss * weight
        activity.enter("optimizer step")
        self.learning_rate.set(self._position, self.batch.gain)
        self.optimizer.step()
        self.average.update()
        return mean_loss / (self.optimizer.reducer.unit * self.comm.world_size) if is_weighted else mean_loss

    def _backward(self, batch: Any, fraction: float) -> tuple[torch.Tensor, Any, bool]:
        """Run forward and backward on a micro-batch that holds ``fraction`` of the step's samples.

        Return the loss, its weight, and whether the task chose the weight; otherwise it is ``fraction``.
        """
        with autocast(self.config.precision, self.comm.device):
            loss = self.task.loss(self.model, batch)
        if isinstance(loss, tuple):
            loss, weight = loss
            self.optimizer.scale(loss, weight).backward()
            return loss.detach(), weight, True
        # Batches may differ in size. With these weights, the mean over ranks of their sum is the mean over samples.
        self.optimizer.scale(loss * (fraction * self.comm.world_size)).backward()
        return loss.detach(), fraction, False

    def _advance(self, share: Share, loss: torch.Tensor, is_skipped: bool) -> None:
        """Move past a step."""
        progress, sampler = self.progress, self.sampler
        part_sizes, epoch = sampler.samples_per_part(share), sampler.epoch
        skipped_samples = sampler.indices(share) if is_skipped else None
        sampler.advance(share)
        progress.step += 1
        progress.samples += share.num_samples
        progress.skipped_steps += is_skipped
        if self.batch.update(
            loss,
            share.num_samples,
            sizes=part_sizes,
            norms=self.optimizer.norms,
            step=progress.step,
            epochs=sampler.epoch + sampler.offset / sampler.num_samples,
            ends_epoch=sampler.epoch > epoch,
            is_skipped=is_skipped,
        ):
            sampler.resize(self.batch.batch_size, self.batch.accumulation)
        progress.epoch, progress.offset = sampler.epoch, sampler.offset
        self.rate_feedback.after_step(loss, share.num_samples, progress)
        self.health.after_step(progress.step, skipped_samples, self.recorder)

    def _log(self, loss: float, seconds: float) -> None:
        progress, optimizer = self.progress, self.optimizer
        step_seconds = progress.step_seconds + seconds
        samples_before, seconds_before = self._logged
        self._logged = (progress.samples, step_seconds)
        record = {
            "epoch": self.epochs,
            "loss": loss,
            "lr": self.learning_rate.lr,
            **self.batch.metrics,
            "samples_per_second": (progress.samples - samples_before) / (step_seconds - seconds_before),
            "skipped_steps": progress.skipped_steps,
            **{name: getattr(optimizer.wire.last_step, name) for name in WIRE},
        }
        if optimizer.grad_norm is not None:
            record["grad_norm"] = optimizer.grad_norm.item()
        if optimizer.loss_scale is not None:
            record["loss_scale"] = optimizer.loss_scale.value
        record.update(self.checkpointer.pop_metrics())
        self.comm.activity.enter("saving", progress.step)
        if self.comm.guard is not None:
            record.update(self.comm.guard.metrics)
        record.update(trust_ratios(optimizer.inner, self.model))
        self.recorder.log_training(progress.step, record)
        self.health.check_loss(progress.step, loss, self.recorder)

    def evaluate(self) -> None:
        """Evaluate the held-out data, if there is any."""
        self._evaluated_at = self.progress.step
        if not self.evaluator.num_samples:
            return
        self.comm.activity.enter("evaluation", self.progress.step)
        self.buffers.synchronize()
        with self.average.applied():
            self._metrics = self.evaluator.run()
            self.stopper.observe(self.progress.step, self._metrics, self.model)
        self.rate_feedback.after_evaluation(self._metrics)
        self.recorder.log_evaluation(self.progress.step, {"epoch": self.epochs, **self._metrics})

    def save(self) -> None:
        """Start to write a checkpoint of the current state."""
        step = self.progress.step
        self.comm.activity.enter("saving", step)
        self.checkpointer.save(step, self._metrics if self._evaluated_at == step else {})

    def _finish(self, started: float) -> dict[str, Any]:
        """Evaluate if need be, wait for checkpoints, and leave the weights that the summary's metrics belong to."""
        progress = self.progress
        if self._evaluated_at != progress.step and not self._is_interrupted:  # resumed after its last step
            self.evaluate()
        self.checkpointer.wait(is_end=True)
        if not self._is_interrupted:
            if self.stopper.restore(self.model):
                self._metrics = self.evaluator.run()
            else:
                self.average.copy_to_model()
        progress.seconds = time.perf_counter() - started
        summary = self.summary()
        self.recorder.finish(summary)
        if self._is_interrupted:
            self.comm.barrier()  # launchers kill the other workers once one has ended with a non-zero exit code
        return summary

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json. ``wire`` counts the bytes of an average worker. A collective."""
        progress = self.progress
        return {
            "engine": self.comm.engine,
            "world_size": self.comm.world_size,
            "steps": progress.step,
            "epochs": self.epochs,
            "seconds": progress.seconds,
            "samples_per_second": progress.samples / progress.step_seconds if progress.step_seconds else 0.0,
            "metrics": self._metrics,
            "wire": self.wire.compute(),
            "skipped_steps": progress.skipped_steps,
            **self._ended_by(),
            **self.stopper.summary(),
        }

    def _ended_by(self) -> dict[str, Any]:
        if self._is_interrupted:
            saved = None if self.checkpointer.latest is None else str(self.checkpointer.latest)
            return {"ended_by": "interrupted", "interrupted_by": self.interruption.requested_by(), "checkpoint": saved}
        return {"ended_by": "last_step" if self._is_over else "early_stopping"}

    def close(self) -> None:
        """Remove the progress bar, wait until pending checkpoints are on disk, and release the run's directory."""
        self.recorder.close()
        self.checkpointer.close()
        self.directory.close()

    @property
    def epochs(self) -> float:
        """Epochs done, including the fraction of the current one."""
        return round(self.progress.epochs, 4)

    @property
    def _position(self) -> float:
        """The position of schedules: the number of optimizer steps, unless the batch grows."""
        return self.run_length.position(self.progress, self.batch.scale_invariant_steps)

    @property
    def _is_over(self) -> bool:
        return self.run_length.is_over(self.progress, self.batch.scale_invariant_steps)

    @property
    def _has_ended(self) -> bool:
        return self._is_over or self.stopper.should_stop

    @property
    def _is_interrupted(self) -> bool:
        return self.interruption.requested and not self._has_ended
