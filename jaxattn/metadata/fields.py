"""What a field of the metadata is: its formula, its shape, its meaning and its other names, in one place.

Two kinds of classes hold fields. `Prepared` ones (`AttentionMetadata`, `VisibleKeys`) hold any
selection of theirs: a field is a method decorated with `metadata_field`, whose body is the formula,
whose docstring the meaning and whose return annotation the shape. A formula reads other fields from its
object; while `derive_fields` runs, they are derived when they are read. Plain records (`Tiles`) are
dataclasses whose fields are `described`, and always complete.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, overload

from jaxattn_kernels.arrays import described as described


class FieldInfo(NamedTuple):
    """A row of the table of fields.

    Attributes:
        name: The name.
        shape: Axes, in the glossary's letters; None for a group of fields.
        dtype: Element type; None for a group of fields.
        meaning: One sentence.
        also_called: What other systems call it.
    """

    name: str
    shape: str | None
    dtype: str | None
    meaning: str
    also_called: str


class MissingFieldError(AttributeError):
    """A field was read that has not been prepared."""


class MetadataField[T]:
    """A field of a `Prepared` class: reads the prepared value, or fails with the field's name."""

    def __init__(self, derive: Callable[[Any], T], also_called: str, needs: str | None) -> None:
        self.derive = derive
        self.also_called = also_called
        self.needs = needs
        self.name = derive.__name__
        self.__doc__ = derive.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> MetadataField[T]: ...
    @overload
    def __get__(self, owner: Prepared, kind: type) -> T: ...
    def __get__(self, owner: Prepared | None, kind: type) -> T | MetadataField[T]:
        return self if owner is None else owner[self.name]

    def info(self) -> FieldInfo:
        """The field's row of the table."""
        annotation = _evaluate(self.derive.__annotations__["return"], self.derive.__module__)
        meaning = (self.__doc__ or "").split("\n\n")[0]
        return FieldInfo(self.name, *_shape_and_dtype(annotation), _one_line(meaning), self.also_called)


def metadata_field[T](
    *, also_called: str = "", needs: str | None = None
) -> Callable[[Callable[[Any], T]], MetadataField[T]]:
    """Make a method the definition of a field.

    Args:
        also_called: What other systems call it.
        needs: What a batch or a call must provide for the field to exist; None where it always does.
    """
    return lambda derive: MetadataField(derive, also_called, needs)


class Prepared:
    """A selection of fields, each computed once; immutable when prepared.

    Attributes:
        values: The prepared fields by name.
    """

    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A field by name, also one that `prepare_metadata` was told how to derive.

        Raises:
            MissingFieldError: If it has not been prepared.
        """
        if name in self.values:
            return self.values[name]
        definition = fields_of(type(self)).get(name)
        needs = f" (it needs {definition.needs})" if definition is not None and definition.needs else ""
        raise MissingFieldError(
            f"field {name!r} of {type(self).__name__} was not prepared{needs}, only {sorted(self.values)}; "
            "select it in prepare_metadata(fields=...)"
        )


def derive_fields[P: Prepared](
    holder: Callable[..., P], names: Iterable[str], formulas: Mapping[str, Callable[[P], Any]], given: Any
) -> P:
    """The named fields of a `Prepared` class, each derived by its formula, once, and no others.

    Args:
        holder: The class, with everything but its `values`.
        names: The fields that are kept.
        formulas: How each field is derived from a `Prepared` object, whose other fields it may read: they are
            derived when they are read.
        given: What the formulas start from, the field "_given".
    """
    values = _Derivation(holder, formulas, given)
    return holder(values={name: values[name] for name in names})


class _Derivation(dict[str, Any]):
    """Values that are derived when they are first read."""

    def __init__(self, holder: Callable[..., Any], formulas: Mapping[str, Any], given: Any) -> None:
        super().__init__(_given=given)
        self._holder = holder
        self._formulas = formulas

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._formulas

    def __missing__(self, name: str) -> Any:
        # What a formula reads from is made anew and not kept: a cycle of references would keep tracers alive.
        self[name] = value = self._formulas[name](self._holder(values=self))
        return value


def formulas_of(kind: type) -> dict[str, Callable[[Any], Any]]:
    """The formulas of all fields that a `Prepared` class defines, those for its own use included."""
    return {name: member.derive for name, member in _definitions(kind).items()}


def fields_of(kind: type) -> dict[str, MetadataField]:
    """The public fields that a `Prepared` class defines, in the order of their definitions."""
    return {name: member for name, member in _definitions(kind).items() if not name.startswith("_")}


def _definitions(kind: type) -> dict[str, MetadataField]:
    members = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    return {name: member for name, member in members.items() if isinstance(member, MetadataField)}


def field_table(kind: type) -> list[FieldInfo]:
    """The table of the fields that a class holds: a `Prepared` one, a record, or one of properties."""
    if issubclass(kind, Prepared):
        return [definition.info() for definition in fields_of(kind).values()]
    if not any("meaning" in f.metadata for f in dataclasses.fields(kind)):
        return [MetadataField(getter, "", None).info() for getter in _getters(kind)]
    return [
        FieldInfo(
            f.name,
            *_shape_and_dtype(_evaluate(f.type, kind.__module__)),
            f.metadata["meaning"],
            f.metadata["also_called"],
        )
        for f in dataclasses.fields(kind)
        if "meaning" in f.metadata
    ]


def _getters(kind: type) -> list[Callable[[Any], Any]]:
    return [value.fget for value in vars(kind).values() if isinstance(value, property) and value.fget]


def _evaluate(annotation: Any, module: str) -> Any:
    """The value of an annotation, which is a string where annotations are postponed."""
    return eval(annotation, vars(sys.modules[module])) if isinstance(annotation, str) else annotation


def _shape_and_dtype(annotation: Any) -> tuple[str | None, str | None]:
    """From a jaxtyping annotation: `Int32[Array, " R_plus_1"]`, or None, is `R+1` and `int32`."""
    annotation = typing.get_args(annotation)[0] if type(None) in typing.get_args(annotation) else annotation
    if not hasattr(annotation, "dim_str"):
        return None, None
    dtype = annotation.dtypes[0]
    axes = ", ".join(annotation.dim_str.split())
    return axes.replace("_plus_", "+").replace("_times_", "×"), dtype


def _one_line(text: str) -> str:
    return " ".join(text.split())
