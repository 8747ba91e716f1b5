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
from disttrain.optim.distributed.membership import (
    add_group,
    check_alike,
    check_arguments,
    check_can_be_unscaled,
    check_own,
    describe,
    named_parameters,
    settings_of,
    to_unfreeze,
)
from disttrain.optim.distributed.skips import Skips
from disttrain.optim.distributed.wrapper import OptimizerWrapper
from disttrain.optim.replicas.sharing import share
from disttrain.optim.replicas.synchronization import average_buffers, broadcast_model, check_same_model
from disttrain.reduction import Ledger, Reducer, SquaredNorms
from disttrain.reduction.bucket import GradientBucket
from disttrain.reduction.measurements.norms import Every, NormMeter
from disttrain.reduction.state.state_dict import load_state, state_dict
from disttrain.reduction.step import Ending


class DistributedOptimizer(OptimizerWrapper):
    """Wraps an optimizer so that every rank steps on the mean of all ranks' gradients.

    Gradients leave while backward is still running, bucket by bucket. When ``backward`` returns, every
    ``parameter.grad`` is the mean over ranks, or what it was before where no rank has used the parameter. What is then
    done to it - clipping, masking, unscaling, a further backward pass - is what ``step`` sees. A step in which any
    rank's gradient holds an inf or NaN is skipped by all ranks and leaves no trace.

    All ranks meet at the end of each backward pass and at each step. A rank that has no backward pass before a step
    takes part in those of the others with zeros.

    Args:
        optimizer: any torch optimizer over parameters of ``model``. It keeps its state and its ``param_groups``, which
            this wrapper shares, so learning-rate schedulers take either.
        model: the module that is trained. Rank 0's parameters and buffers are copied to all ranks.
        comm: from ``disttrain.init``. Any number of optimizers may share it.
        compressor: an instance, a name (``"topk"``), or a mapping as in a config: ``{"name": "topk", "ratio": 0.01}``,
            with ``rules`` for some of the parameters and ``dense_steps`` if need be (``compression.Policy``).
        bucket_mb: MiB of gradient that travel together; None leaves it to the compressor.
        clip_norm: largest global norm of the mean gradient; None does not clip.
        loss_scale: what the losses were multiplied by, for float16. Gradients are divided by it as they leave, so all
            else is in true units; ``step`` lets it fall after an overflow and rise again.
        clip_value: largest magnitude of an entry of the mean gradient; None does not clip. Before ``clip_norm``, so
            that both bounds hold.
        norms_every: measure the norms of gradients, for their noise, once in so many steps; None never does. Under
            compression a measured step exchanges the gradients once more, dense; "auto" measures one in ten of such
            steps, and all others.
        overlap_step: wait for the means in ``step`` (or ``synchronize``) in place of at the end of ``backward``. Until
            then ``parameter.grad`` is None where a gradient is on its way. It saves one small round of messages a step,
            and where the optimizer treats each parameter for itself it steps on what has arrived while the rest is on
            the wire.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the losses. Only compressors that keep a residual need it:
            so that the residual is in true units whatever the scale is.

    Attributes:
        wire: the ledger of bytes: ``wire.last_step``, ``wire.total``, ``wire.by_compressor``; of the last step
            ``wire.entries``, ``wire.by_parameter()``, and ``wire.table()`` as text.
        grad_norm: global norm of the last mean gradient before ``clip_norm`` scaled it, if that is set.
        skipped_steps: number of steps skipped: a gradient was not finite, or a rank dropped its gradients.
        consecutive_skipped_steps: number of steps skipped since the last one that was taken.
        vote: what this rank tells the others with the next step, 0 to 255, at no cost; 0 at first, and kept until set.
        agreed_vote: the largest vote that any rank had in the last step, alike on all.
        model, comm: as given.
        inner: the wrapped optimizer. Public attributes and methods that torch's optimizers do not have are its own.

    Raises:
        UserError: a parameter is not the model's own, is complex, or none can be trained; the optimizer wants sparse
            gradients; the model or the settings differ between ranks; a compressor or rule does not suit the model.
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
        check_arguments(optimizer, bucket_mb=bucket_mb, clip_norm=clip_norm, clip_value=clip_value)
        if loss_scale is not None and grad_scaler is not None:
            raise UserError("give either a loss_scale or a grad_scaler: each scales the losses by itself")
        super().__init__(optimizer)
        self.loss_scale, self.grad_scaler = loss_scale, grad_scaler
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.grad_norm: torch.Tensor | None = None
        self._skips = Skips()
        self.model, self.comm = model, comm
        self._has_stepped = False
        check_same_model(model, comm)  # first, as it raises on all ranks what may be wrong on one
        trained, frozen = named_parameters(optimizer, model)
        if not trained:
            raise UserError("the optimizer has no parameter that requires a gradient: nothing to train")
        if loss_scale is not None:
            check_can_be_unscaled(trained)
        policy = Policy.build(compressor)
        members = describe(optimizer, (*trained, *frozen))
        limits = {"bucket_mb": bucket_mb, "clip_norm": clip_norm, "clip_value": clip_value, "norms_every": norms_every}
        check_alike({**members, "compressor": policy.to_dict(), "overlap_step": overlap_step, **limits}, comm)
        broadcast_model(model, comm)
        self._names = {parameter: name for name, parameter in (*trained, *frozen)}
        self._kept_buffers = KeptBuffers(model)
        self.reducer = reducer = Reducer(
            trained,
            comm,
            policy,
            bucket_mb,
            later=frozen,
            overlap_step=overlap_step,
            describe=f"{type(optimizer).__name__} over {trained[0][0]}, ... ({len(trained)} parameters)",
        )
        reducer.settings = lambda: settings_of(optimizer.param_groups)
        reducer.on_unsound = self._kept_buffers.restore
        self._norm_meter = None if norms_every is None else NormMeter(norms_every, reducer.ledger, reducer.channel)
        if self._norm_meter is not None:
            reducer.meters.append(self._norm_meter)
        if loss_scale is not None:
            reducer.loss_scale = lambda: loss_scale.value
        if grad_scaler is not None:
            reducer.loss_scale, reducer.rescales = grad_scaler.get_scale, True
        comm.activity.begin_step(1)

    @property
    def skipped_steps(self) -> int:
        return self._skips.total

    @property
    def consecutive_skipped_steps(self) -> int:
        return self._skips.consecutive

    @property
    def norms(self) -> SquaredNorms | None:
        """Squared norms of the last step's gradients before compression, if it was measured and sound."""
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
        return self.reducer.ledger

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self.inner!r}, world_size={self.comm.world_size})"

    # Backward

    def scale(self, loss: torch.Tensor, weight: float | torch.Tensor | None = None) -> torch.Tensor:
        """What ``backward`` is to be called on, where the loss has a scale or a weight.

        Args:
            loss: of this rank's samples, 0-d.
            weight: what the loss is a mean over: a number of tokens, a sum of class weights. The gradients are then
                those of the sum of weight * loss over the sum of the weights, over all ranks and all backward passes of
                the step. Ranks meet here for that sum, so all give weights or none. None: each rank's loss counts
                alike.

        Returns:
            The loss times its weight and times the loss scale, as far as there are such.
        """
        if weight is not None:
            loss = loss * weight
            self.reducer.weigh(float(weight))
        return loss if self.loss_scale is None else self.loss_scale.scale(loss)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Inside, backward passes only add up gradients locally; the first one outside sends the sum."""
        return self.reducer.no_sync()

    def measure_first_pass(self) -> None:
        """With ``norms_every`` in one process: inside ``no_sync``, after the first of a step's several backward passes.

        Noise is measured between parts of a batch. With several processes those are the ranks', and this does nothing.
        """
        if self._norm_meter is not None:
            scale = 1.0 if self.loss_scale is None else self.loss_scale.value
            self._norm_meter.measure_first_pass(self.reducer.buckets, scale)

    def synchronize(self) -> bool:
        """Wait until every ``parameter.grad`` is the mean over ranks. A collective.

        Needed with ``overlap_step``, or to send what passes under ``no_sync`` have left. False if some rank had a
        non-finite gradient: all gradients are NaN then, and ``step`` will skip.
        """
        return self.reducer.synchronize()

    # Step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip the means if asked, and take the wrapped optimizer's step. A collective.

        A closure is evaluated with its gradients exchanged, and returns the loss averaged over ranks, so optimizers
        that evaluate it repeatedly (LBFGS) take the same decisions everywhere.
        """
        result = self._step() if closure is None else self._step_with(closure)
        self.comm.activity.end_step()
        return result

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        if self.loss_scale is not None:
            raise UserError("a step with a closure cannot be skipped, so it takes no loss_scale: train in bfloat16")
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
            self.reducer.end(Ending.TAKEN)
        return None if loss is None else self.comm.all_reduce(torch.as_tensor(loss).detach(), "mean")

    def _step(self) -> Any:
        self._has_stepped = False
        ending = self.reducer.take(self._step_on if self._can_step_by_bucket() else None)
        if self.loss_scale is not None and ending is not Ending.DROPPED:
            self.loss_scale.update(ending is Ending.TAKEN)
        self._skips.note(ending)
        if ending is not Ending.TAKEN:
            if ending is Ending.UNSOUND:
                self.reducer.end(ending)
            return None
        if self.reducer.step.num_exchanges == 0 or self.reducer.members.some_came_to_rest:
            check_own(self.model, self._names)
        result = None
        if not self._has_stepped:
            self._clip()
            result = self.inner.step()
        self.reducer.end(ending)
        self._kept_buffers.keep()
        return result

    def _can_step_by_bucket(self) -> bool:
        """Whether the means may be stepped on one bucket after another, in place of all at once.

        That hides the optimizer's time behind the wire. On a GPU the wire is done before the host could start a step.
        """
        overlaps = self.reducer.overlap_step and self.comm.device.type == "cpu" and self.clip_norm is None
        return overlaps and acts_by_parameter(self.inner)

    def _step_on(self, bucket: GradientBucket) -> None:
        self._has_stepped = True
        if self.clip_value is not None:
            clip_values_([bucket.flat], self.clip_value)
        self.inner.step()  # skips parameters without a gradient: all but this bucket's

    def _clip(self) -> None:
        gradients = list(mean_gradients(self.reducer.buckets))
        if self.clip_value is not None:
            clip_values_(gradients, self.clip_value)
        if self.clip_norm is not None:
            self.grad_norm = clip_norm_(gradients, self.clip_norm)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the mean gradients so that their global 2-norm is at most ``max_norm``; the norm before, 0-d.

        The same rule as ``torch.nn.utils.clip_grad_norm_``, on whole buckets. A collective.
        """
        self.synchronize()
        return clip_norm_(list(mean_gradients(self.reducer.buckets)), max_norm)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """``GradScaler.step`` asks whether this optimizer unscales gradients by itself: it does not.

        Raises:
            UserError: the scaler cannot do it either, or residuals would be in scaled units.
        """
        check_can_be_scaled_by_torch(self.reducer, self.grad_scaler)
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) all gradients. What they had changed in compressors' state is taken back.

        To drop gradients that other ranks step on makes those skip their step.
        """
        was_under_way = self.reducer.step.is_under_way
        self.reducer.drop()
        if was_under_way:
            self._kept_buffers.keep()
        self.inner.zero_grad(set_to_none)

    def join(self) -> None:
        """For a rank that has run out of data: take part in the others' steps with zeros until all ranks call this.

        Then all have the weights, optimizer state and learning rates of the rank that went on longest, so that the next
        epoch can begin. Means are over all ranks, those with zeros too, unless losses have weights (``scale``).
        """
        last = self.reducer.sequencer.join()
        share(self.model, self.inner, self.comm, last)

    # Members

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters of the model from the next step on; to be called on all ranks, between steps.

        Their values are copied from rank 0.

        Raises:
            UserError: they are not the model's, ranks add different ones, or a step is under way.
        """
        self._check_between_steps("added")
        trained, frozen = add_group(self.inner, self.model, param_group, self._names, self.comm)
        self._names |= {parameter: name for name, parameter in (*trained, *frozen)}
        self.reducer.extend(trained, frozen)

    def unfreeze(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Train parameters that were frozen so far, from the next step on; to be called on all ranks, between steps.

        The same as ``requires_grad_(True)``, but checked on all ranks. All others keep their buckets, residuals and
        optimizer state. A run that goes on from a checkpoint thaws in the same order before it loads the state.

        Raises:
            UserError: a parameter is not the wrapped optimizer's, ranks thaw different ones, or a step is under way.
        """
        self._check_between_steps("unfrozen")
        thawed = to_unfreeze(parameters, self.model, self._names, self.comm)
        if self.loss_scale is not None:
            check_can_be_unscaled(thawed)
        for _, parameter in thawed:
            parameter.requires_grad_(True)
        self.reducer.unfreeze()

    def _check_between_steps(self, what: str) -> None:
        if self.reducer.step.is_under_way:
            raise UserError(f"parameters cannot be {what} between backward and step: do it after the step")

    def synchronize_buffers(self) -> None:
        """Average the model's floating-point buffers (BatchNorm statistics) over ranks, copy the others from rank 0.

        Training leaves each rank with statistics of its own samples: call this before evaluation and before saving.
        """
        average_buffers(self.model, self.comm)
        self.keep_buffers()

    def keep_buffers(self) -> None:
        """Note that buffers were changed on purpose: a step that is skipped goes back to what they are now."""
        self._kept_buffers.keep()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, plus the compressor's under ``"compression"``, and ``"loss_scale"`` if any.

        ``compression["per_rank"]`` (residuals) is this rank's own: save one a rank, or the sums not yet sent are lost.
        """
        state = {**self.inner.state_dict(), "compression": state_dict(self.reducer.buckets, self.comm)}
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, from this class or from the plain optimizer.

        Residuals that another rank saved are not taken: they start at zero, with a warning.
        """
        inner = dict(state_dict)
        saved, loss_scale = inner.pop("compression", None), inner.pop("loss_scale", None)
        self.reducer.members.revert()
        self.inner.load_state_dict(inner)
        self._kept_buffers.keep()
        if saved is not None:
            load_state(self.reducer.buckets, saved, self.comm)
        if loss_scale is not None and self.loss_scale is not None:
            self.loss_scale.load_state_dict(loss_scale)
