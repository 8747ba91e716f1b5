"""Validation of configs, with errors in one line that suggest the nearest valid key or name, or state the bounds.

Everything that a config selects by name (optimizer, schedule, compressor, task) is a pydantic class whose fields are
the keys of its config section. A ``Registry`` turns the section into an instance.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails

from disttrain.errors import UserError


class Section(BaseModel):
    """Base class of all config sections: immutable, without unknown keys or NaN. ``true`` is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_as_number(cls, value: Any, info: Any) -> Any:
        annotation = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and ("int" in annotation or "float" in annotation) and "bool" not in annotation:
            raise UserError("should be a number")
        return value


S = TypeVar("S", bound=BaseModel)


class Registry(Generic[S]):
    """Classes that a config selects by name.

    Args:
        key: config key of the section that is built, for messages ("optimizer").
        base: base class of all classes.
        classes: classes by their names in a config. Later additions to the mapping take effect.
        find: looks up a name that is not in ``classes``; returns a class, or None if there is none.
    """

    def __init__(
        self,
        key: str,
        base: type[S],
        classes: Mapping[str, type[S]],
        find: Callable[[str], type[S] | None] = lambda name: None,
    ) -> None:
        self.key, self._base, self._classes, self._find = key, base, classes, find

    def names(self) -> list[str]:
        return sorted(self._classes)

    def get(self, name: str) -> type[S]:
        """Return the class of that name.

        Raises:
            UserError: there is no such class. The message suggests the nearest name.
        """
        found = self._classes.get(name) or self._find(name)
        if found is None:
            raise UserError(f"unknown {self.key} {name!r}{hint(name, self.names())}")
        return found

    def name_of(self, instance: BaseModel) -> str:
        """Return the name by which ``get`` finds the instance's class; an import path if the class is not listed."""
        cls = type(instance)
        listed = (name for name, known in self._classes.items() if known is cls)
        return next(listed, f"{cls.__module__}:{cls.__qualname__}")

    def dump(self, instance: BaseModel) -> dict[str, Any]:
        """Return plain data from which ``build`` recreates the instance."""
        return {"name": self.name_of(instance), **instance.model_dump(mode="json")}

    def build(self, spec: Any, key: str = "") -> S:
        """Build an instance from an instance, a name, or a mapping with ``name`` and the fields of that class.

        Args:
            spec: the section, its name, or an instance, which is returned as it is.
            key: config key of the section in messages; "" for the registry's own key.

        Raises:
            UserError: the name or a field is unknown, or a value is out of bounds.
        """
        if isinstance(spec, self._base):
            return spec
        key = key or self.key
        fields = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(fields, Mapping):
            raise UserError(f"{key}={spec!r} should be a name or a section with a name: {', '.join(self.names())}")
        fields = dict(fields)
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f"missing key '{key}.name': choose from {', '.join(self.names())}")
        return validate(self.get(name), fields, key)


def validate(model: type[S], fields: Mapping[str, Any], key: str = "") -> S:
    """Return ``model(**fields)``.

    Raises:
        UserError: some fields are invalid. One line lists them all, with ``key`` prefixed to each.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        raise UserError(explain(error, model, key)) from error


def explain(error: ValidationError, model: type[BaseModel], key: str = "") -> str:
    """Return one line with the error of each key and its correction."""
    return "; ".join(_explain_one(details, model, key) for details in error.errors(include_url=False))


def _explain_one(details: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    *above, _ = (prefix, *map(str, details["loc"])) if details["loc"] else (prefix, "")
    section, key = _join(*above), _join(prefix, *map(str, details["loc"]))
    value, kind, context = details["input"], details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        known = keys_of(_model_at(model, details["loc"][:-1]))
        return unknown_key(key, value, (_join(section, name) for name in known))
    if kind == "missing":
        description = _field_description(model, details["loc"])
        return f"missing key {key!r}" + (f": {description}" if description else "")
    if isinstance(cause := context.get("error"), UserError):
        message = str(cause)
        # Other messages (of a nested named section) already contain the key.
        return f"{key}={value!r} {message}" if message.startswith(("should", "must")) else message
    if kind == "model_type":
        return f"{key}={value!r} should be a section with keys {', '.join(keys_of(_model_at(model, details['loc'])))}"
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if kind == "literal_error":
        choices = [choice.strip("' ") for choice in str(context["expected"]).replace(" or ", ",").split(",")]
        return f"unknown {key} {value!r}{hint(str(value), choices)}"
    return f"{key}={value!r} {message}"


def unknown_key(key: str, value: Any, known: Iterable[str]) -> str:
    """Return the message for an unknown key."""
    given = "" if isinstance(value, Mapping) else f" (given {value!r})"
    return f"unknown key {key!r}{given}{hint(key, known)}"


def hint(word: str, choices: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` if one choice is similar to ``word``, else the list of all choices."""
    choices = list(choices)
    nearest = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if not nearest:  # compare last parts: `lr` for `optimizer.lr`, or a misspelling of it
        ends = {choice.rpartition(".")[2]: choice for choice in choices}
        nearest = [ends[end] for end in difflib.get_close_matches(word.rpartition(".")[2], ends, n=1, cutoff=0.7)]
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; choose from {', '.join(choices)}" if choices else ""


def keys_of(model: type[BaseModel]) -> list[str]:
    """Return all keys of a section; the keys of nested sections are dotted."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(name)
        if (section := _section_in(field.annotation)) is not None:
            keys += [f"{name}.{inner}" for inner in keys_of(section)]
    return keys


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the section at a dotted key, or the innermost section on the path to it."""
    for part in location:
        field = model.model_fields.get(str(part))
        section = field and _section_in(field.annotation)
        if section is None:
            break
        model = section
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in a field's type, which may be optional; None if there is none."""
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)


def _field_description(model: type[BaseModel], location: tuple[int | str, ...]) -> str | None:
    field = _model_at(model, location[:-1]).model_fields.get(str(location[-1]))
    return field.description if field else None


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))
