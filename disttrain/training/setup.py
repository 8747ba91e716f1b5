"""The parts of a training run, made from its config."""

from __future__ import annotations

import os
import threading

import torch
from torch import nn

from disttrain.batching import GrowingBatch
from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.optim.replicas.synchronization import check_has_values
from disttrain.tasks import Task
from disttrain.training.config import Config
from disttrain.training.data.sampler import ShardedSampler
from disttrain.training.monitoring.evaluation import Evaluator
from disttrain.training.run.random_state import seed_everything

_BUILDING = threading.Lock()  # simulated ranks are threads, which share the global random generators


def set_up_torch(comm: Communicator, num_threads: int | None, deterministic: bool) -> None:
    """Share the host's cores among its workers, and prefer algorithms that give the same bits in every run."""
    if num_threads is None:
        num_threads = max(1, len(os.sched_getaffinity(0)) // comm.local_size)
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
    if comm.device.type == "cuda":  # on CPUs, torch's algorithms are deterministic already
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_model(task: Task) -> nn.Module:
    """Return the task's model.

    Raises:
        UserError: parameters or buffers have no values yet.
    """
    model = task.build_model()
    try:
        check_has_values(model)
    except UserError as error:
        raise UserError(f"{type(task).__name__}.build_model: {error}") from error
    return model


def build_seeded_model(config: Config, comm: Communicator) -> nn.Module:
    """Return the model on its device, with the same values on all ranks."""
    with _BUILDING:
        seed_everything(config.seed)
        return build_model(config.task).to(comm.device, getattr(torch, config.dtype))


def build_sampler(config: Config, comm: Communicator, num_samples: int, accumulation: int) -> ShardedSampler:
    """Return the sampler at the start of the run.

    Raises:
        UserError: ``drop_last`` leaves no step.
    """
    sampler = ShardedSampler(
        num_samples,
        batch_size=config.batch_size,
        accumulation=accumulation,
        seed=config.seed,
        rank=comm.rank,
        world_size=comm.world_size,
        drop_last=config.drop_last,
    )
    if sampler.steps_per_epoch == 0:
        raise UserError(
            f"drop_last=true leaves no step: batch_size={config.batch_size} is more than the data's "
            f"{num_samples} samples"
        )
    return sampler


def build_optimizer(config: Config, model: nn.Module, comm: Communicator, batch: GrowingBatch) -> DistributedOptimizer:
    """Freeze layers as the config says, and return the optimizer of the model. A collective."""
    config.layers.freeze(model)  # first, as the optimizer makes buckets for what is trained
    return DistributedOptimizer(
        config.optimizer.build(config.layers.groups(model, config.optimizer.lr)),
        model,
        comm=comm,
        compressor=config.compressor,
        bucket_mb=config.bucket_mb,
        clip_norm=config.clip_norm,
        loss_scale=config.loss_scale.build() if config.precision == "fp16" else None,
        clip_value=config.clip_value,
        norms_every=batch.norms_every,
        overlap_step=True,
    )


def check_same_data(num_samples: int, num_held_out: int, comm: Communicator) -> None:
    """Raise UserError, on all ranks, if the ranks have different data. A collective."""
    sizes = comm.all_gather_object([num_samples, num_held_out])
    if len(distinct := {tuple(pair) for pair in sizes}) > 1:
        raise UserError(f"ranks have different data: (training, held-out) samples are {sorted(distinct)}")


def check_metrics(config: Config, schedule_metric: str | None, evaluator: Evaluator) -> None:
    """Check that evaluation will return the metrics that the config names, before hours have been spent.

    Raises:
        UserError: it will not.
    """
    if config.early_stopping is not None:
        evaluator.check_metric("early_stopping.metric", config.early_stopping.metric)
    if schedule_metric is not None:
        evaluator.check_metric("schedule.metric", schedule_metric, "loss")
    if config.checkpoint.keep_best is not None:
        evaluator.check_metric("checkpoint.keep_best.metric", config.checkpoint.keep_best.metric)
