"""The distributed optimizer: any torch optimizer, stepping on the mean gradient of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.comm.base import Communicator
from disttrain.compression import Compressor, Policy
from disttrain.errors import UserError
from disttrain.optim.distributed.amp import check_can_be_scaled_by_torch
from disttrain.optim.distributed.by_parameter import acts_by_parameter
from disttrain.optim.distributed.clipping import clip_norm_, clip_values_, mean_gradients
from disttrain.optim.distributed.kept_buffers import KeptBuffers
from disttrain.optim.distributed.loss_scale import LossScale
from disttrain.optim.distributed.parameters import add_group, check_can_be_unscaled, check_not_replaced, find_frozen
from disttrain.optim.distributed.second_moments import SecondMoments
from disttrain.optim.distributed.setup import build_reducer, check_arguments, connect
from disttrain.optim.distributed.skips import SkipCounter
from disttrain.optim.distributed.wrapper import OptimizerWrapper
from disttrain.optim.replicas.sharing import share
from disttrain.optim.replicas.synchronization import average_buffers
from disttrain.reduction import Ledger, SquaredNorms
from disttrain.reduction.buckets.bucket import GradientBucket
from disttrain.reduction.measurements.norms import Every, NormMeter
from disttrain.reduction.state.state_dict import load_state, state_dict
from disttrain.reduction.step import StepResult


class DistributedOptimizer(OptimizerWrapper):
    """Wraps an optimizer so that every rank steps on the mean of all ranks' gradients.

    Gradients are sent bucket by bucket while backward is running. When ``backward`` returns, every ``parameter.grad``
    is the mean over ranks, or unchanged if no rank has used the parameter. What you then do to it (clip, mask, unscale,
    run a further backward pass) is what ``step`` sees. If any rank's gradient holds an inf or NaN, all ranks skip the
    step, and it leaves no trace.

    All ranks meet at the end of each backward pass and at each step. A rank without a backward pass before a step takes
    part in the others' with zeros.

    Args:
        optimizer: any torch optimizer over parameters of ``model``. It keeps its state and its ``param_groups``, which
            this wrapper shares, so learning-rate schedulers take either.
        model: the module to train. Rank 0's parameters and buffers are copied to all ranks.
        comm: from ``disttrain.init``. Any number of optimizers may share it.
        compressor: an instance, a name (``"topk"``), or a mapping as in a config: ``{"name": "topk", "ratio": 0.01}``,
            optionally with ``rules`` for some parameters, ``dense_steps`` and ``whiten`` (``compression.Policy``).
        bucket_mb: MiB of gradient that are exchanged together; None leaves it to the compressor.
        clip_norm: largest global norm of the mean gradient; None does not clip.
        loss_scale: scales the losses, for float16. Gradients are divided by it as they are sent, so everything else is
            in true units. ``step`` lets it decrease after an overflow and increase again.
        clip_value: largest magnitude of an element of the mean gradient; None does not clip. Applied before
            ``clip_norm``, so that both bounds hold.
        norms_every: number of steps between two measurements of gradient norms, for gradient noise; None never
            measures. With compression a measured step exchanges the gradients once more, dense; "auto" measures one in
            ten of such steps, and all others.
        overlap_step: wait for the means in ``step`` (or ``synchronize``), not at the end of ``backward``. Until then
            ``parameter.grad`` is None while it is being exchanged. This saves one small collective a step, and if the
            optimizer treats each parameter by itself, it steps on buckets as they arrive.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the losses. Only compressors that keep a residual need it,
            so that the residual is in true units while the scale changes.

    Attributes:
        wire: the ledger of bytes: ``wire.last_step``, ``wire.total``, ``wire.by_compressor``; of the last step
            ``wire.entries``, ``wire.by_parameter()``, and ``wire.table()`` as text.
        grad_norm: global norm of the last mean gradient before clipping, with ``clip_norm``.
        skipped_steps: number of skipped steps: a gradient was not finite, or a rank dropped its gradients.
        consecutive_skipped_steps: number of steps skipped since the last one that was taken.
        vote: what this rank tells the others with the next step, 0 to 255, at no cost; initially 0, and kept until set.
        agreed_vote: the largest vote of all ranks in the last step.
        model, comm, loss_scale, grad_scaler, clip_norm, clip_value: as given.
        inner: the wrapped optimizer. Public attributes and methods that torch's optimizers do not have are its own.
        reducer: what exchanges the gradients.

    Raises:
        UserError: a parameter is not the model's own, is complex, or none can be trained; the optimizer takes sparse
            gradients only; the model or the settings differ between ranks; a compressor or rule does not suit the
            model.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module,
        *,
        comm: Communicator,
        compressor: Policy | Compressor | str | Mapping[str, Any] = "dense",
        bucket_mb: float | None = None,
        clip_norm: float | None = None,
        loss_scale: LossScale | None = None,
        clip_value: float | None = None,
        norms_every: Every | None = None,
        overlap_step: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if isinstance(optimizer, DistributedOptimizer):
            raise UserError("the optimizer is a DistributedOptimizer already: wrap the plain torch optimizer, once")
        clipping = {"clip_norm": clip_norm, "clip_value": clip_value}
        check_arguments(optimizer, loss_scale, grad_scaler, {"bucket_mb": bucket_mb, **clipping})
        super().__init__(optimizer)
        self.model, self.comm = model, comm
        self.loss_scale, self.grad_scaler = loss_scale, grad_scaler
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.grad_norm: torch.Tensor | None = None
        self._skips = SkipCounter()
        policy = Policy.build(compressor)
        self._second_moments = SecondMoments(optimizer, are_used=policy.whiten is not None)
        self.reducer, self._names = build_reducer(
            optimizer,
            model,
            comm,
            policy,
            bucket_mb=bucket_mb,
            overlap_step=overlap_step,
            loss_scale=loss_scale,
            settings={**clipping, "norms_every": norms_every},
        )
        connect(self.reducer, optimizer, loss_scale, grad_scaler)
        self._kept_buffers = KeptBuffers(model)
        self.reducer.on_nonfinite = self._kept_buffers.restore
        self._norm_meter: NormMeter | None = None
        if norms_every is not None:
            self._norm_meter = NormMeter(norms_every, self.reducer.executor)
            self.reducer.meters.append(self._norm_meter)
        comm.activity.begin_step(1)

    @property
    def skipped_steps(self) -> int:
        return self._skips.total

    @property
    def consecutive_skipped_steps(self) -> int:
        return self._skips.consecutive

    @property
    def norms(self) -> SquaredNorms | None:
        """Squared norms of the last step's gradients before compression; None unless measured and finite."""
        return None if self._norm_meter is None else self.reducer.results.get(self._norm_meter)

    @property
    def vote(self) -> int:
        return self.reducer.vote

    @vote.setter
    def vote(self, vote: int) -> None:
        self.reducer.vote = vote

    @property
    def agreed_vote(self) -> int:
        return self.reducer.agreed_vote

    @property
    def wire(self) -> Ledger:
        return self.reducer.executor.ledger

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self.inner!r}, world_size={self.comm.world_size})"

    # Backward

    def scale(self, loss: torch.Tensor, weight: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss that ``backward`` is to be called on, if losses have a scale or weights.

        Args:
            loss: of this rank's samples, 0-d.
            weight: what the loss is a mean over: a number of tokens, a sum of class weights. The gradients are then
                those of the sum of weight * loss over the sum of the weights, over all ranks and all backward passes of
                the step. The ranks meet here for that sum, so either all give weights or none. None: the losses of all
                ranks count the same.

        Returns:
            The loss times its weight, if given, and times the loss scale, if there is one.
        """
        if weight is not None:
            loss = loss * weight
            self.reducer.add_loss_weight(float(weight))
        return loss if self.loss_scale is None else self.loss_scale.scale(loss)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Accumulate gradients locally within; the first backward pass outside sends the sum."""
        return self.reducer.no_sync()

    def measure_first_pass(self) -> None:
        """Measure the gradients of the first of several backward passes, with ``norms_every`` in one process.

        To be called inside ``no_sync``. Gradient noise is estimated from parts of a batch, which with several processes
        are the ranks': then this does nothing.
        """
        if self._norm_meter is not None:
            scale = 1.0 if self.loss_scale is None else self.loss_scale.value
            self._norm_meter.measure_first_pass(self.reducer.buckets, scale)

    def synchronize(self) -> bool:
        """Wait until every ``parameter.grad`` is the mean over ranks. A collective.

        Needed with ``overlap_step``, or to send what was accumulated under ``no_sync``.

        Returns:
            Whether the gradients are finite. If some rank's are not, all gradients are NaN, and ``step`` will skip.
        """
        return self.reducer.synchronize()

    # Step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip the mean gradients, if asked to, and step the wrapped optimizer. A collective.

        Args:
            closure: evaluates the loss and runs backward. Its gradients are exchanged, and the optimizer gets the loss
                averaged over ranks, so one that evaluates it repeatedly (LBFGS) decides the same on all ranks.
        """
        result = self._step() if closure is None else self._step_with(closure)
        self.comm.activity.end_step()
        return result

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        if self.loss_scale is not None:
            raise UserError("a step with a closure cannot be skipped, so it takes no loss_scale: train in bfloat16")
        if self._second_moments.are_used:
            raise UserError("compressor.whiten takes no closure: call backward, then step()")
        result: Any = self.inner.step(lambda: self._evaluate(closure))  # type: ignore[arg-type,return-value]
        self._kept_buffers.keep()
        return result

    def _evaluate(self, closure: Callable[[], Any]) -> torch.Tensor | None:
        with torch.enable_grad():
            loss = closure()
        if not self.synchronize():
            raise FloatingPointError("a gradient was inf or NaN on some rank: a step with a closure cannot be skipped")
        self._clip()
        if self.reducer.step.is_under_way:
            self.reducer.end_step(StepResult.TAKEN)
        return None if loss is None else self.comm.all_reduce(torch.as_tensor(loss).detach(), "mean")

    def _step(self) -> Any:
        reducer = self.reducer
        step_result = reducer.agree_on_step(self._step_on if self._can_step_by_bucket() else None)
        if self.loss_scale is not None and step_result is not StepResult.DROPPED:
            self.loss_scale.update(step_result is StepResult.TAKEN)
        self._skips.count(step_result)
        if step_result is StepResult.DROPPED:
            return None
        if step_result is StepResult.NON_FINITE:
            reducer.end_step(step_result)
            return None
        if reducer.step.num_exchanges == 0 or reducer.registry.has_newly_unused:
            check_not_replaced(self.model, self._names)
        result = None
        if not reducer.step.has_stepped:
            self._clip()
            result = self._second_moments.step(reducer.buckets)
        reducer.end_step(step_result)
        self._kept_buffers.keep()
        return result

    def _can_step_by_bucket(self) -> bool:
        """Whether the optimizer may step on buckets as they arrive, so that its time overlaps communication.

        On a GPU communication has ended before the host could start a step.
        """
        overlaps = self.reducer.overlap_step and self.comm.device.type == "cpu" and self.clip_norm is None
        return overlaps and acts_by_parameter(self.inner)

    def _step_on(self, bucket: GradientBucket) -> None:
        if self.clip_value is not None:
            clip_values_([bucket.flat], self.clip_value)
        self._second_moments.step([bucket])  # skips parameters without a gradient: all but those of this bucket

    def _clip(self) -> None:
        gradients = list(mean_gradients(self.reducer.buckets))
        if self.clip_value is not None:
            clip_values_(gradients, self.clip_value)
        if self.clip_norm is not None:
            self.grad_norm = clip_norm_(gradients, self.clip_norm)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the mean gradients so that their global 2-norm is at most ``max_norm``. A collective.

        The rule is that of ``torch.nn.utils.clip_grad_norm_``.

        Returns:
            The norm before, 0-d.
        """
        self.synchronize()
        return clip_norm_(list(mean_gradients(self.reducer.buckets)), max_norm)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether this optimizer unscales gradients by itself, as ``GradScaler.step`` asks: it does not.

        Raises:
            UserError: the scaler cannot unscale them either, or residuals would be in scaled units.
        """
        check_can_be_scaled_by_torch(self.reducer, self.grad_scaler)
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) all gradients, and revert what they have changed in the compressors' state.

        If gradients of a step are dropped on one rank, all ranks skip the step.
        """
        was_under_way = self.reducer.step.is_under_way
        self.reducer.drop_gradients()
        if was_under_way:
            self._kept_buffers.keep()
        self.inner.zero_grad(set_to_none)

    def join(self) -> None:
        """Take part in the others' steps with zeros until all ranks call this. Call it when a rank has run out of data.

        In the end all ranks have the weights, optimizer state and learning rates of the rank that was active last.
        Means are over all ranks, those with zeros included, unless losses have weights (``scale``).
        """
        last = self.reducer.sequencer.join()
        share(self.model, self.inner, self.comm, last)
        self._second_moments.share(self.reducer.buckets, self.comm, last)

    # Parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters of the model from the next step on. To be called on all ranks between steps.

        Rank 0's values are copied to all ranks.

        Raises:
            UserError: they are not the model's, ranks add different ones, or there are gradients to step on.
        """
        self._check_between_steps("added")
        trained, frozen = add_group(self.inner, self.model, param_group, self._names, self.comm)
        self._names |= {parameter: name for name, parameter in (*trained, *frozen)}
        self.reducer.extend(trained, frozen)

    def unfreeze(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Train frozen parameters from the next step on. To be called on all ranks between steps.

        The same as ``requires_grad_(True)``, but checked on all ranks. Other parameters keep their buckets, residuals
        and optimizer state. A run that resumes from a checkpoint unfreezes in the same order before it loads the state.

        Raises:
            UserError: a parameter is not the wrapped optimizer's, ranks unfreeze different ones, or there are gradients
                to step on.
        """
        self._check_between_steps("unfrozen")
        frozen = find_frozen(parameters, self.model, self._names, self.comm)
        if self.loss_scale is not None:
            check_can_be_unscaled(frozen)
        for _, parameter in frozen:
            parameter.requires_grad_(True)
        self.reducer.unfreeze()

    def _check_between_steps(self, what: str) -> None:
        if self.reducer.step.is_under_way:
            raise UserError(f"parameters cannot be {what} between backward and step: do it after the step")

    def synchronize_buffers(self) -> None:
        """Average the model's floating-point buffers (BatchNorm statistics) over ranks; copy the others from rank 0.

        In training each rank has statistics of its own samples: call this before evaluation and before saving.
        """
        average_buffers(self.model, self.comm)
        self.keep_buffers()

    def keep_buffers(self) -> None:
        """Keep the buffers as they are now, after changing them on purpose: a skipped step restores these values."""
        self._kept_buffers.keep()

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, the compressor's under ``"compression"``, and ``"loss_scale"`` if any.

        ``compression["per_rank"]`` (residuals) is this rank's own: save one per rank, or residuals are lost.
        """
        state = {**self.inner.state_dict(), "compression": state_dict(self.reducer.buckets, self.comm)}
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of the plain optimizer.

        Residuals that another rank saved are not loaded: they start at zero, with a warning.
        """
        inner = dict(state_dict)
        saved, loss_scale = inner.pop("compression", None), inner.pop("loss_scale", None)
        self.reducer.registry.revert()
        self.inner.load_state_dict(inner)
        self._kept_buffers.keep()
        self.reducer.registry.restart_whitening()
        if saved is not None:
            load_state(self.reducer.buckets, saved, self.comm)
        if loss_scale is not None and self.loss_scale is not None:
            self.loss_scale.load_state_dict(loss_scale)
