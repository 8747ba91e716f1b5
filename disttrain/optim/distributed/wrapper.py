"""An optimizer that wraps another one, which keeps its parameters, groups and state."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Delegates to the wrapped optimizer, so that learning-rate schedulers and hooks take either.

    The rule, for reading and for setting: ``param_groups``, ``state``, ``defaults`` and step hooks are the wrapped
    optimizer's. Private names, names of this class and of torch's ``Optimizer``, and attributes that the wrapped
    optimizer did not have when they were set are the wrapper's. All other names are the wrapped optimizer's.

    Attributes:
        inner: the wrapped optimizer.
    """

    inner: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ is not called: parameters, groups and state stay the wrapped optimizer's.
        self.inner = optimizer

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"a {type(self).__name__} holds live connections: save its state_dict() instead")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self.inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.inner.register_step_post_hook(hook)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped optimizer that neither this class nor torch's ``Optimizer`` has."""
        if name.startswith("_") or "inner" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("inner")
        is_own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name) or not hasattr(inner, name)
        if inner is None or is_own:
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)
