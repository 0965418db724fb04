"""Frozen dataclasses to canonical JSON and back, and the content key that names them.

A record is written with sorted keys, without spaces, in UTF-8, so that equal records have equal text and
equal keys on every machine. Reading is strict: a missing, unknown or wrongly typed field is an error that
says where. Nothing here executes what it reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from sedimo.errors import StateError

Record = TypeVar("Record")


def to_plain(value: object) -> Any:
    """The value as dictionaries, lists, strings, numbers, booleans and None; a TypeError for anything else."""
    if hasattr(value, "__plain__"):
        return value.__plain__()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}")


def to_json(value: object) -> str:
    """Canonical JSON text of a record.

    Example:
        >>> to_json({"b": 1, "a": (True, None)})
        '{"a":[true,null],"b":1}'
    """
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(value: object) -> str:
    """sha256 of the record's canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def parse_json(text: str | bytes, *, place: str = "record") -> Any:
    """Plain values from JSON text; duplicate keys and non-standard constants are refused."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{place} is not valid JSON: {error}") from error


def from_json(kind: type[Record], text: str | bytes, *, place: str = "record") -> Record:
    """The record of type `kind` that `text` describes."""
    return from_plain(kind, parse_json(text, place=place), place=place)


def from_plain(kind: type[Record], plain: object, *, place: str = "record") -> Record:
    """The value of type `kind` that the plain value describes; strict, and a StateError names the `place`."""
    return typing.cast("Record", _read(kind, plain, place))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the constant {name} is not JSON")


def _fail(place: str, wanted: object, plain: object) -> StateError:
    shown = repr(plain)
    return StateError(f"{place} must be {wanted}, got {shown if len(shown) < 80 else shown[:77] + '...'}")


def _read(kind: Any, plain: Any, place: str) -> Any:
    if hasattr(kind, "__from_plain__"):
        return _made(place, kind.__from_plain__, plain, place)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, plain, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is None:
        return _read_scalar(kind, plain, place)
    if origin not in _READERS:
        raise TypeError(f"{place}: records cannot hold the type {kind}")
    return _READERS[origin](arguments, plain, place)


def _made(place: str, make: Callable[..., Any], /, *given: Any, **fields: Any) -> Any:
    """What a record makes of values, which it may refuse."""
    try:
        return make(*given, **fields)
    except ValueError as error:
        raise StateError(f"{place}: {error}") from error


def _read_scalar(kind: Any, plain: Any, place: str) -> Any:
    if kind is typing.Any:
        return plain
    if kind is float and isinstance(plain, dict) and set(plain) == {"float"}:
        if plain["float"] in ("inf", "-inf", "nan"):
            return float(plain["float"])
        raise _fail(place, "a float", plain)
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        try:
            return float(plain)
        except OverflowError as error:
            raise _fail(place, "a float", f"an integer of {plain.bit_length()} bits") from error
    if kind in (type(None), None) and plain is None:
        return None
    if kind in (str, int, float, bool) and type(plain) is kind:
        return plain
    raise _fail(place, f"of type {getattr(kind, '__name__', kind)}", plain)


def _read_union(kinds: tuple[Any, ...], plain: Any, place: str) -> Any:
    reasons = []
    for kind in kinds if plain is None else [k for k in kinds if k is not types.NoneType]:
        try:
            return _read(kind, plain, place)
        except StateError as error:
            reasons.append(str(error))
    raise StateError(min(reasons, key=len))


def _read_tuple(kinds: tuple[Any, ...], plain: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(plain, list):
        raise _fail(place, "a list", plain)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_read(kinds[0], v, f"{place}[{i}]") for i, v in enumerate(plain))
    if len(plain) != len(kinds):
        raise _fail(place, f"a list of {len(kinds)}", plain)
    return tuple(_read(k, v, f"{place}[{i}]") for i, (k, v) in enumerate(zip(kinds, plain, strict=True)))


def _read_mapping(kinds: tuple[Any, ...], plain: Any, place: str) -> dict[str, Any]:
    if not isinstance(plain, dict):
        raise _fail(place, "an object", plain)
    return {k: _read(kinds[1], v, f"{place}.{k}") for k, v in plain.items()}


def _read_literal(choices: tuple[Any, ...], plain: Any, place: str) -> Any:
    if any(type(plain) is type(choice) and plain == choice for choice in choices):
        return plain
    raise _fail(place, f"one of {list(choices)}", plain)


def _read_dataclass(kind: Any, plain: Any, place: str) -> Any:
    if not isinstance(plain, dict):
        raise _fail(place, "an object", plain)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(plain.keys() - fields.keys()):
        raise StateError(f"{place} has unknown fields {unknown}; known are {sorted(fields)}")
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - plain.keys()):
        raise StateError(f"{place} lacks the fields {missing}")
    hints = typing.get_type_hints(kind)
    return _made(place, kind, **{n: _read(hints[n], v, f"{place}.{n}") for n, v in plain.items()})


_READERS: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    typing.Union: _read_union,
    types.UnionType: _read_union,
    Literal: _read_literal,
    tuple: _read_tuple,
    dict: _read_mapping,
    Mapping: _read_mapping,
}
