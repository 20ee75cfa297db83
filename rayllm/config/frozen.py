"""Frozen dataclasses whose values are checked whenever one is made: the few types that recipes are made of.

Plain dataclasses, and these few lines, so that the page of help is there at once: a library for it takes longer to be
imported and to prepare its validators than everything else that help does.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from rayllm.config.fields import alternatives, bare, describe_type, element_of

_T = TypeVar("_T")
_annotations: dict[type, dict[str, Any]] = {}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the values of a field must keep to: `Annotated[int, Bounds(gt=0)]`."""

    gt: float | None = None
    ge: float | None = None
    le: float | None = None
    min_length: int | None = None
    pattern: str | None = None
    """A regular expression that a whole text must match."""

    def hold(self, value: Any) -> bool:
        """Whether a value keeps to them."""
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.le is None or value <= self.le)
            and (self.min_length is None or len(value) >= self.min_length)
            and (self.pattern is None or re.fullmatch(self.pattern, value) is not None)
        )


class Misfit(ValueError):
    """A value that a field cannot hold. `path` leads to it from the tree's root."""

    def __init__(self, problem: str, path: tuple[str, ...] = ()) -> None:
        self.problem, self.path = problem, path
        super().__init__(f"{'.'.join(path)}: {problem}" if path else problem)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def frozen(cls: type[_T]) -> type[_T]:
    """A frozen dataclass that raises ValueError, when it is made, where a value does not fit its field. Defaults are
    taken as they stand."""

    def check(self: Any) -> None:
        for name, annotation in annotations_of(type(self)).items():
            if (value := getattr(self, name)) is not getattr(type(self), name, dataclasses.MISSING):
                object.__setattr__(self, name, _fit_member(value, annotation, name))

    cls.__post_init__ = check  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def build(schema: type[_T], tree: Mapping[str, Any]) -> _T:
    """The dataclass that plain values (dict, list, str, int, float, bool, None) stand for.

    Raises Misfit for the first that does not fit, in the order of the fields.
    """
    annotations = annotations_of(schema)
    for name in tree:
        if name not in annotations:
            raise Misfit("there is no such key", (name,))
    return schema(**{n: _fit_member(tree[n], annotation, n) for n, annotation in annotations.items() if n in tree})


def annotations_of(schema: type) -> dict[str, Any]:
    """Name and type of each field, in order."""
    if schema not in _annotations:
        _annotations[schema] = get_type_hints(schema, include_extras=True)
    return _annotations[schema]


def _fit_member(value: Any, annotation: Any, name: str) -> Any:
    try:
        return _fit(value, annotation)
    except Misfit as misfit:
        raise Misfit(misfit.problem, (name, *misfit.path)) from None


def _fit(value: Any, annotation: Any) -> Any:
    """The value as its field holds it: a list as a tuple, a whole number as a float, a dict as its dataclass."""
    for member in alternatives(annotation):
        kind = bare(member)
        is_fit, fitted = _convert(value, kind)
        if is_fit and (get_origin(member) is not Annotated or all(rule.hold(fitted) for rule in member.__metadata__)):
            return fitted
    raise Misfit(f"got {value!r}, expected {describe_type(annotation)}")


def _convert(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a kind, and as what. Raises Misfit for what is within a list or a group."""
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return (True, build(kind, value)) if isinstance(value, dict) else (isinstance(value, kind), value)
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind)), value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return False, value
        return True, tuple(_fit_member(item, element_of(kind), str(i)) for i, item in enumerate(value))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return math.isfinite(value), float(value)
        except OverflowError:  # a whole number beyond all floats
            return False, value
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool), value
