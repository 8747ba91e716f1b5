"""The distributed optimizer: any torch optimizer, stepping on the mean gradient of all ranks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.comm.base import Communicator
from disttrain.compression import Compressor, Policy
from disttrain.errors import UserError
from disttrain.optim.lamb import LAMB
from disttrain.optim.lars import LARS
from disttrain.optim.loss_scale import LossScale
from disttrain.optim.replicas import average_buffers, broadcast_model, check_same_model
from disttrain.reduction import Ledger, Reducer, SquaredNorms
from disttrain.reduction.bucket import GradientBucket, NamedParameter
from disttrain.reduction.norms import Every
from disttrain.reduction.state import load_state, state_dict

logger = logging.getLogger(__name__)

_BY_PARAMETER = {
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "ASGD", "Rprop")
} | {LARS, LAMB}


class DistributedOptimizer(Optimizer):
    """Wraps an optimizer so that every rank steps on the mean of all ranks' gradients.

    Gradients leave while backward is still running, bucket by bucket; ``step`` waits for their means. A step in which
    any rank's gradient holds an inf or NaN is skipped by all ranks and leaves no trace.

    Args:
        optimizer: any torch optimizer over parameters of ``model``. It keeps its state and its ``param_groups``, which
            this wrapper shares, so learning-rate schedulers take either.
        model: the module that is trained. Rank 0's parameters and buffers are copied to all ranks.
        comm: from ``disttrain.init``.
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

    Attributes:
        wire: the ledger of bytes: ``wire.last_step``, ``wire.total``, ``wire.by_compressor``; of the last step
            ``wire.entries``, ``wire.by_parameter()``, and ``wire.table()`` as text.
        grad_norm: global norm of the last mean gradient before ``clip_norm`` scaled it, if that is set.
        skipped_steps: number of steps skipped because of a non-finite gradient.
        vote: what this rank tells the others with the next step, 0 to 255, at no cost; 0 at first, and kept until set.
        agreed_vote: the largest vote that any rank had in the last step, alike on all.
        model, comm: as given.

    Raises:
        UserError: a parameter is not the model's own, is complex, or none can be trained; the optimizer wants sparse
            gradients; the model differs between ranks; a compressor or rule does not suit the model.
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
    ) -> None:
        # Optimizer.__init__ is not called: the parameters, their groups and state stay the wrapped optimizer's.
        if isinstance(optimizer, DistributedOptimizer):
            raise UserError("the optimizer is a DistributedOptimizer already: wrap the plain torch optimizer, once")
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise UserError("SparseAdam wants sparse gradients, and means are exchanged dense: use Adam")
        if bucket_mb is not None and bucket_mb <= 0:
            raise UserError(f"bucket_mb must be above 0; got {bucket_mb}")
        for name, limit in (("clip_norm", clip_norm), ("clip_value", clip_value)):
            if limit is not None and limit <= 0:
                raise UserError(f"{name} must be above 0; got {limit}")
        self.inner = optimizer
        self.loss_scale = loss_scale
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.grad_norm: torch.Tensor | None = None
        self.skipped_steps = self._skipped_in_a_row = 0
        self.model, self.comm = model, comm
        self._synchronized: bool | None = None
        self._has_stepped = False
        trained, frozen = _named_parameters(optimizer, model)
        check_same_model(model, comm)
        broadcast_model(model, comm)
        self.reducer = Reducer(
            trained, comm, Policy.build(compressor), bucket_mb, later=frozen, norms_every=norms_every
        )
        self._reduced = {parameter for _, parameter in trained}
        comm.activity.begin_step(1)
        if loss_scale is not None:
            _check_can_be_unscaled(trained)
            self.reducer.scale = loss_scale.value

    @property
    def norms(self) -> SquaredNorms | None:
        """Squared norms of the last step's gradients before compression, if it was measured and sound."""
        return self.reducer.norms

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

    def __getattr__(self, name: str) -> Any:
        """All else - ``param_groups``, ``state``, ``defaults``, hooks - is the wrapped optimizer's."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self.inner!r}, world_size={self.comm.world_size})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a DistributedOptimizer holds live connections: save its state_dict() instead")

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, if there is one: what ``backward`` is to be called on."""
        return loss if self.loss_scale is None else self.loss_scale.scale(loss)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Inside, backward passes only add up gradients locally; the first one outside sends the sum."""
        return self.reducer.no_sync()

    def measure_first_pass(self) -> None:
        """With ``norms_every`` in one process: inside ``no_sync``, after the first of a step's several backward passes.

        Noise is measured between parts of a batch. With several processes those are the ranks' own, and this does
        nothing.
        """
        self.reducer.measure_first_pass()

    def synchronize(self) -> bool:
        """Wait until every ``parameter.grad`` is the mean over ranks, to clip or look at it before ``step``.

        Returns:
            False if some rank had a non-finite gradient: all gradients are NaN then, and ``step`` will skip.
        """
        if self._synchronized is None:
            self._check_parameters()
            self._synchronized = self.reducer.synchronize()
        return self._synchronized

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Wait for the means, clip if asked, and take the wrapped optimizer's step.

        A closure is evaluated with its gradients exchanged, and returns the loss averaged over ranks, so optimizers
        that evaluate it repeatedly (LBFGS) take the same decisions everywhere.
        """
        result = self._step() if closure is None else self._step_with(closure)
        self.comm.activity.end_step()
        return result

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        if self.loss_scale is not None:
            raise UserError("a step with a closure cannot be skipped, so it takes no loss_scale: train in bfloat16")
        return self.inner.step(lambda: self._evaluate(closure))  # type: ignore[arg-type,return-value]

    def _step(self) -> Any:
        is_sound = self._step_while_arriving() if self._can_step_by_bucket() else self._take_means()
        if self.loss_scale is not None:
            self.loss_scale.update(is_sound)
            self.reducer.scale = self.loss_scale.value
        if not is_sound:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
            _warn_of_skips(self.skipped_steps, self._skipped_in_a_row)
            return None
        self._skipped_in_a_row = 0
        if self._has_stepped:
            self._has_stepped = False
            return None
        return self.inner.step()

    def _can_step_by_bucket(self) -> bool:
        """Whether the means may be stepped on one bucket after another, in place of all at once.

        That hides the optimizer's time behind the wire. It is the same arithmetic for those that treat each parameter
        for itself; a norm over all gradients, a user's hook or a subclass may want to see them together.
        """
        inner = self.inner
        hooks = [*inner._optimizer_step_pre_hooks.values(), *inner._optimizer_step_post_hooks.values()]
        hooked = not all(getattr(hook, "acts_by_parameter", False) for hook in hooks)
        return type(inner) in _BY_PARAMETER and self.clip_norm is None and self._synchronized is None and not hooked

    def _step_while_arriving(self) -> bool:
        def step(bucket: GradientBucket) -> None:
            self._has_stepped = True
            self._clip_values(bucket)
            self.inner.step()  # skips parameters without a gradient: all but this bucket's

        self._check_parameters()
        is_sound = self.reducer.synchronize(step)
        if is_sound and not self._has_stepped:  # a second exchange had to follow
            self._clip_values(*self.reducer.buckets)
        return is_sound

    def _evaluate(self, closure: Callable[[], Any]) -> torch.Tensor:
        with torch.enable_grad():
            loss = closure()
        if not self._take_means():
            raise FloatingPointError("a gradient was inf or NaN on some rank: a step with a closure cannot be skipped")
        return self.comm.all_reduce(torch.as_tensor(loss).detach(), "mean")

    def _take_means(self) -> bool:
        """Finish this step's exchange, clipped if asked; whether it is sound."""
        is_sound = self.synchronize()
        if is_sound:
            self._clip_values(*self.reducer.buckets)
        if is_sound and self.clip_norm is not None:
            self.grad_norm = self.clip_grad_norm_(self.clip_norm)
        self._synchronized = None
        return is_sound

    def _clip_values(self, *buckets: GradientBucket) -> None:
        """Bound every entry of the means by ``clip_value``: each for itself, so bucket by bucket as they arrive."""
        if self.clip_value is not None:
            for bucket in buckets:
                bucket.flat.clamp_(-self.clip_value, self.clip_value)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the mean gradients so that their global 2-norm is at most ``max_norm``; the norm before, 0-d.

        The same rule as ``torch.nn.utils.clip_grad_norm_``, on whole buckets.
        """
        self.synchronize()
        flats = [bucket.flat for bucket in self.reducer.buckets]
        norms = [torch.linalg.vector_norm(flat, dtype=torch.promote_types(flat.dtype, torch.float32)) for flat in flats]
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for flat in flats:
            flat.mul_(factor.to(flat.device, flat.dtype))
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) all gradients, also those of an exchange whose ``step`` was left out."""
        if self._synchronized is None and self.reducer.has_sent:
            self.reducer.synchronize()  # what is on the wire must arrive before its buffers are used again
        self._synchronized = None
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise UserError(
            "parameters cannot be added to a DistributedOptimizer: add them to the optimizer before wrapping it"
        )

    def unfreeze(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Train parameters that were frozen so far, from the next step on; to be called on all ranks, between steps.

        They must be in the wrapped optimizer's groups, and have their rates there, from the start. All others keep
        their buckets, residuals and optimizer state; these get buckets of their own, behind the present ones: best thaw
        first what backward reaches first. A run that goes on from a checkpoint thaws in the same order before it loads
        the state. (The statistics of a frozen BatchNorm layer follow the data all the while.)

        Raises:
            UserError: a parameter is not the wrapped optimizer's, ranks thaw different ones, or a step is under way.
        """
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        held = {parameter for group in self.inner.param_groups for parameter in group["params"]}
        wanted = set(parameters)
        if foreign := [names.get(parameter, "?") for parameter in wanted - held]:
            raise UserError(
                f"{sorted(foreign)[0]!r} cannot be unfrozen: give it to the torch optimizer before that is wrapped"
            )
        if self.reducer.has_sent or self._synchronized is not None:
            raise UserError("parameters cannot be unfrozen between backward and step: do it after the step")
        thawed = [(name, p) for p, name in names.items() if p in wanted and p not in self._reduced]
        if len(different := {tuple(n) for n in self.comm.all_gather_object([name for name, _ in thawed])}) > 1:
            raise UserError(f"ranks unfreeze different parameters: {sorted(different)}; do it alike everywhere")
        if self.loss_scale is not None:
            _check_can_be_unscaled(thawed)
        for _, parameter in thawed:
            parameter.requires_grad_(True)
        if thawed:
            self.reducer.add(thawed)
            self._reduced |= wanted

    def _check_parameters(self) -> None:
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self._reduced:
                    raise UserError(
                        "a parameter has a gradient but was frozen when the DistributedOptimizer was made: "
                        "unfreeze it by optimizer.unfreeze(parameters), on all ranks"
                    )

    def synchronize_buffers(self) -> None:
        """Average the model's floating-point buffers (BatchNorm statistics) over ranks, copy the others from rank 0.

        Training leaves each rank with statistics of its own samples: call this before evaluation and before saving.
        """
        average_buffers(self.model, self.comm)

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
        self.inner.load_state_dict(inner)
        if saved is not None:
            load_state(self.reducer.buckets, saved, self.comm)
        if loss_scale is not None and self.loss_scale is not None:
            self.loss_scale.load_state_dict(loss_scale)
            self.reducer.scale = self.loss_scale.value


def _named_parameters(
    optimizer: Optimizer, model: torch.nn.Module
) -> tuple[list[NamedParameter], list[NamedParameter]]:
    """The optimizer's parameters by name, in the model's order: those that require a gradient, and the frozen ones."""
    optimized: Iterable[torch.nn.Parameter] = (
        parameter for group in optimizer.param_groups for parameter in group["params"]
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    wanted = set(optimized)
    for parameter in wanted:
        if parameter not in names:
            shape = tuple(parameter.shape)
            raise UserError(
                f"the optimizer has a parameter of shape {shape} that is not the model's: pass its own model"
            )
        if parameter.is_complex():
            raise UserError(f"parameter {names[parameter]!r} is complex: hold it as torch.view_as_real(...)")
    trained = [(name, p) for p, name in names.items() if p in wanted and p.requires_grad]
    if not trained:
        raise UserError("the optimizer has no parameter that requires a gradient: nothing to train")
    return trained, [(name, p) for p, name in names.items() if p in wanted and not p.requires_grad]


def _warn_of_skips(in_all: int, in_a_row: int) -> None:
    """Each of the first ten in a row, then ever fewer: a run that has gone astray would say nothing else."""
    if in_a_row <= 10 or in_a_row.bit_count() == 1:
        logger.warning(
            "step skipped: a gradient was inf or NaN on some rank (%d so far)%s",
            in_all,
            "; more of them in a row are reported at powers of two" if in_a_row == 10 else "",
        )


def _check_can_be_unscaled(trained: Iterable[NamedParameter]) -> None:
    for name, parameter in trained:
        if parameter.dtype == torch.float16:
            raise UserError(
                f"parameter {name!r} is float16, in which unscaled gradients would vanish: "
                "keep parameters in float32 and compute under torch.autocast"
            )
