"""The training loop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Console

from disttrain.batching import GrowingBatch
from disttrain.comm import Communicator
from disttrain.comm.collective_errors import collective_errors
from disttrain.errors import UserError
from disttrain.optim.averaging import NoAverage
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.optim.layers.unfreezing import Unfreezing
from disttrain.optim.model_buffers import ModelBuffers
from disttrain.optim.optimizers.layerwise import trust_ratios
from disttrain.optim.schedules.learning_rate import LearningRate
from disttrain.training.checkpoints.checkpointer import Checkpointer
from disttrain.training.config import Checkpoint, Config, Evaluation
from disttrain.training.data.loading import (
    ShardedSampler,
    Share,
    check_loader_workers,
    eval_batches,
    first_batch,
    num_samples_of,
    to_device,
    train_batches,
)
from disttrain.training.evaluation import evaluate, evaluating, num_held_out_of
from disttrain.training.monitoring.early_stopping import NoStopper, Stopper
from disttrain.training.monitoring.health import Monitor
from disttrain.training.monitoring.plateau import watch
from disttrain.training.monitoring.recorder import NullRecorder, Recorder
from disttrain.training.precision import autocast
from disttrain.training.run.interruption import Interruption
from disttrain.training.run.length import RunLength
from disttrain.training.run.progress import WIRE, Progress
from disttrain.training.run.random_state import seed_everything
from disttrain.training.run.setup import build_model, set_up_torch

_BUILDING = threading.Lock()  # virtual ranks are threads, which share the random generators


class Trainer:
    """One rank's part of a run. All ranks construct it, call ``run``, and ``close`` it.

    Raises:
        UserError: the config does not fit the workers, the data or the checkpoint; the same on all ranks.
    """

    def __init__(self, config: Config, comm: Communicator, console: Console | None = None) -> None:
        self.config, self.comm, self.task = config, comm, config.task
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        with collective_errors(comm):
            config.check_world_size(comm.world_size)
            if config.loader_workers:
                check_loader_workers()
            set_up_torch(comm, config.num_threads, config.deterministic)
            with _BUILDING:
                seed_everything(config.seed)  # alike on all ranks, so that models are
                self.model = build_model(self.task).to(comm.device, self.dtype)
            self.train_data, self.eval_data = self.task.train_data(), self.task.eval_data()
            num_samples, num_held_out = num_samples_of(self.train_data), num_held_out_of(self.eval_data)
        with collective_errors(comm):
            if len(sizes := {tuple(sizes) for sizes in comm.all_gather_object([num_samples, num_held_out])}) > 1:
                raise UserError(f"ranks have different data, (training, held-out) samples are {sorted(sizes)}")
            self.batch = GrowingBatch(config.batch, comm, config.batch_size, num_samples, config.accumulation)
            self.sampler = ShardedSampler(
                num_samples,
                batch_size=config.batch_size,
                accumulation=self.batch.accumulation,
                seed=config.seed,
                rank=comm.rank,
                world_size=comm.world_size,
                drop_last=config.drop_last,
            )
            if self.sampler.steps_per_epoch == 0:
                raise UserError(
                    f"drop_last=true leaves no step: batch_size={config.batch_size} is more than the data's "
                    f"{num_samples} samples"
                )
            self.run_length = RunLength.of(config, num_samples)
            self.num_steps = self.run_length.num_steps
            config.schedule.check(self.num_steps, self.run_length.steps_per_epoch)
            config.layers.freeze(self.model)
            self.optimizer = DistributedOptimizer(
                config.optimizer.build(config.layers.groups(self.model, config.optimizer.lr)),
                self.model,
                comm=comm,
                compressor=config.compressor,
                bucket_mb=config.bucket_mb,
                clip_norm=config.clip_norm,
                loss_scale=config.loss_scale.build() if config.precision == "fp16" else None,
                clip_value=config.clip_value,
                norms_every=self.batch.norms_every,
                overlap_step=True,
            )
            self.health = Monitor(config.health, self.optimizer)
            self.unfreezing = Unfreezing(config.layers, self.optimizer, self.num_steps)
            self.average = config.average.build(self.optimizer) if config.average else NoAverage()
            self.buffers = ModelBuffers(self.optimizer, self.average)
            self.learning_rate = LearningRate(
                self.optimizer,
                config.schedule,
                self.num_steps,
                steps_per_epoch=self.run_length.steps_per_epoch,
                scale=config.optimizer.scale(config.batch_size),
            )
            self.plateau = watch(config.schedule, self.learning_rate, comm)
            self.stopper = self._stopper()
            if self.plateau.needs_evaluation:
                self.plateau.check(self._metric_names("schedule.metric"))
            if config.checkpoint.keep_best is not None:
                config.checkpoint.keep_best.check(self._metric_names("checkpoint.keep_best"))
        comm.activity.enter("resuming", 0)
        self.progress, self.interruption = Progress(), Interruption(self.optimizer)
        self.checkpointer = Checkpointer(self)
        self._metrics: dict[str, float] = {}
        self._evaluated_at: int | None = None
        self._logged = (self.progress.samples, self.progress.step_seconds)
        self.recorder: Recorder | NullRecorder = NullRecorder()
        if comm.rank == 0:
            self.recorder = Recorder(
                config.directory,
                self.progress.step,
                self.num_steps,
                console or Console(),
                position=self._position if self._counts_data else None,
            )

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluating and saving as the config says; the summary, equal on all ranks.

        A signal to any rank ends it after the step under way, with a checkpoint if the config has any.
        """
        with self.interruption:
            return self._run()

    def _run(self) -> dict[str, Any]:
        progress, began = self.progress, time.perf_counter() - self.progress.seconds
        for share, batches in self._steps():
            started = time.perf_counter()
            loss = self.train_step(share, batches)
            self._advance(share, loss)
            is_last = self._has_ended()
            if is_last or progress.step % self.config.log_every == 0:
                self._log(self.comm.all_reduce(loss).item(), time.perf_counter() - started)
            progress.step_seconds += time.perf_counter() - started
            self.recorder.step(self._position)
            if is_last or self._is_due(self.config.evaluation):
                self.evaluate()
                is_last = self._has_ended()
            progress.seconds = time.perf_counter() - began
            is_last = is_last or self.interruption.requested
            if self.config.checkpoint.enabled and (is_last or self._is_due(self.config.checkpoint)):
                self.save()
            if is_last:
                break
        if self._evaluated_at != progress.step and not self._is_interrupted:  # a run was resumed that had ended
            self.evaluate()
        self.checkpointer.settle(is_end=True)
        if not self._is_interrupted:
            self._take_result()
        progress.seconds = time.perf_counter() - began
        summary = self.summary()
        self.recorder.finish(summary)
        if self._is_interrupted:
            self.comm.barrier()  # launchers kill the others once one has ended with a code that is not 0
        return summary

    def train_step(self, share: Share, batches: Iterator[Any]) -> torch.Tensor:
        """One optimizer step on this rank's part of the samples; its part of the mean loss over all of them."""
        activity = self.comm.activity
        activity.begin_step(self.progress.step + 1)
        self.unfreezing.unfreeze_due(self.progress.step)
        self.optimizer.zero_grad()
        mean_loss = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        is_weighted = False
        last = len(share.micro_batches) - 1
        for index, (start, stop) in enumerate(share.micro_batches):
            if start == stop:
                continue  # the last step of an epoch has too few samples for all ranks
            activity.enter("data loading")
            batch = to_device(next(batches), self.comm.device, self.dtype)
            activity.enter("forward and backward")
            with (
                self.batch.record_memory(self.model, stop - start),
                self.optimizer.no_sync() if index < last else contextlib.nullcontext(),
            ):
                with autocast(self.config.precision, self.comm.device):
                    loss = self.task.loss(self.model, batch)
                if isinstance(loss, tuple):
                    loss, part = loss
                    is_weighted = True
                    self.optimizer.scale(loss, part).backward()
                else:
                    part = (stop - start) / share.num_samples
                    # Parts may differ in size. So weighted, their sum's mean over ranks is the mean over samples.
                    self.optimizer.scale(loss * (part * self.comm.world_size)).backward()
                if index == 0 and index < last:
                    self.optimizer.measure_first_pass()
            mean_loss += loss.detach() * part
        activity.enter("optimizer step")
        self.learning_rate.set(self._position, self.batch.gain)
        self.optimizer.step()
        self.average.update()
        return mean_loss / (self.optimizer.reducer.unit * self.comm.world_size) if is_weighted else mean_loss

    def evaluate(self) -> None:
        """Evaluate the held-out data, if there is any."""
        self._evaluated_at = self.progress.step
        if self.eval_data is None:
            return
        self.comm.activity.enter("evaluation", self.progress.step)
        self.buffers.synchronize()
        with self.average.applied():
            self._metrics = self._measure()
            self.stopper.see(self.progress.step, self._metrics, self.model)
        self.plateau.evaluation(self._metrics)
        self.recorder.evaluation(self.progress.step, {"epoch": self.epochs, **self._metrics})

    def _measure(self) -> dict[str, float]:
        assert self.eval_data is not None
        batches = eval_batches(self.config, self.eval_data, self.comm)
        with autocast(self.config.precision, self.comm.device):
            return evaluate(self.task, self.model, batches, self.comm, self.dtype)

    def _take_result(self) -> None:
        """Leave the weights in the model that the summary's metrics are of: the best, the averaged, or the last."""
        if self.stopper.restore(self.model):
            self._metrics = self._measure()
        else:
            self.average.copy_to_model()

    def save(self) -> None:
        """Take a checkpoint of this very moment; it is written while training goes on."""
        self.comm.activity.enter("saving", self.progress.step)
        self.checkpointer.save(self._metrics if self._evaluated_at == self.progress.step else {})

    def summary(self) -> dict[str, Any]:
        """What summary.json holds. ``wire`` counts the bytes of an average worker."""
        progress = self.progress
        return {
            "engine": self.comm.engine,
            "world_size": self.comm.world_size,
            "steps": progress.step,
            "epochs": self.epochs,
            "seconds": progress.seconds,
            "samples_per_second": progress.samples / progress.step_seconds if progress.step_seconds else 0.0,
            "metrics": self._metrics,
            "wire": self.checkpointer.wire(),
            "skipped_steps": progress.skipped_steps,
            **self._ended_by(),
            **self.stopper.summary(),
        }

    def _ended_by(self) -> dict[str, Any]:
        if self._is_interrupted:
            saved = None if self.checkpointer.latest is None else str(self.checkpointer.latest)
            return {"ended_by": "interrupted", "interrupted_by": self.interruption.asked_by(), "checkpoint": saved}
        return {"ended_by": "last_step" if self._is_over else "early_stopping"}

    def close(self) -> None:
        """Take down the progress bar, let what is being saved reach the disk, release the run's directory."""
        self.recorder.close()
        self.checkpointer.close()

    def _has_ended(self) -> bool:
        return self._is_over or self.stopper.is_over

    @property
    def _is_interrupted(self) -> bool:
        return self.interruption.requested and not self._has_ended()

    @property
    def _is_over(self) -> bool:
        return self.run_length.is_over(self.progress, self.batch.scale_invariant_steps)

    @property
    def _position(self) -> float:
        """Where schedules stand: the number of optimizer steps, unless the batch grows."""
        return self.run_length.position(self.progress, self.batch.scale_invariant_steps)

    @property
    def _counts_data(self) -> bool:
        """Whether the run's length is no number of optimizer steps: the batch grows, or was another one before."""
        return self.run_length.may_take_fewer_steps or self._position != self.progress.step

    @property
    def epochs(self) -> float:
        """Epochs done, with the part of the present one."""
        return round(self.progress.epoch + self.progress.offset / self.sampler.num_samples, 4)

    def _steps(self) -> Iterator[tuple[Share, Iterator[Any]]]:
        """From the position on to the end of the run: a step's share, and an iterator that its batches are next on."""
        self.model.train()
        if self._has_ended():
            return
        while True:
            batches = train_batches(self.config, self.train_data, self.sampler, self.comm)
            for share in self.sampler.shares():
                size = self.sampler.batch_size
                yield share, batches
                if self.sampler.batch_size != size:
                    break  # the loader has read ahead in batches of the old size: a new one goes on at the position

    def _advance(self, share: Share, loss: torch.Tensor) -> None:
        progress, sampler = self.progress, self.sampler
        skipped_steps = self.checkpointer.skipped_before + self.optimizer.skipped_steps
        is_sound = skipped_steps == progress.skipped_steps
        sizes, epoch = sampler.part_sizes(share), sampler.epoch
        skipped = None if is_sound else sampler.indices(share)
        sampler.advance(share)
        progress.step += 1
        progress.samples += share.num_samples
        progress.skipped_steps = skipped_steps
        if self.batch.update(
            loss,
            share.num_samples,
            sizes=sizes,
            norms=self.optimizer.norms,
            step=progress.step,
            epochs=sampler.epoch + sampler.offset / sampler.num_samples,
            ends_epoch=sampler.epoch > epoch,
            is_skipped=not is_sound,
        ):
            sampler.resize(self.batch.batch_size, self.batch.accumulation)
        progress.epoch, progress.offset = sampler.epoch, sampler.offset
        self.plateau.step(loss, share.num_samples, progress)
        self.health.step(progress.step, skipped, self.recorder)

    def _is_due(self, section: Evaluation | Checkpoint) -> bool:
        by_step = section.every_steps is not None and self.progress.step % section.every_steps == 0
        ends_epoch = self.progress.offset == 0
        by_epoch = section.every_epochs is not None and self.progress.epoch % section.every_epochs == 0
        return by_step or (ends_epoch and by_epoch)

    def _log(self, loss: float, seconds: float) -> None:
        progress = self.progress
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
            **{name: getattr(self.optimizer.wire.last_step, name) for name in WIRE},
        }
        if self.optimizer.grad_norm is not None:
            record["grad_norm"] = self.optimizer.grad_norm.item()
        if self.optimizer.loss_scale is not None:
            record["loss_scale"] = self.optimizer.loss_scale.value
        record.update(self.checkpointer.take_metrics())
        self.comm.activity.enter("saving", self.progress.step)
        if self.comm.guard is not None:
            record.update(self.comm.guard.metrics)
        record.update(trust_ratios(self.optimizer.inner, self.model))
        self.recorder.train(progress.step, record)
        self.health.loss(progress.step, loss, self.recorder)

    def _stopper(self) -> Stopper | NoStopper:
        """Also sees to it that the metric exists, before hours have been spent."""
        if self.config.early_stopping is None:
            return NoStopper()
        self.config.early_stopping.check(self._metric_names("early_stopping"))
        return Stopper(self.config.early_stopping)

    def _metric_names(self, asking: str) -> Mapping[str, Any]:
        """What evaluation will give, from one batch."""
        if self.eval_data is None:
            raise UserError(f"{asking} looks at held-out data, and the task has none: remove it")
        batch = to_device(first_batch(self.config, self.eval_data), self.comm.device, self.dtype)
        with torch.no_grad(), evaluating(self.model), autocast(self.config.precision, self.comm.device):
            return self.task.evaluate(self.model, batch)
