"""Typed tables: how a description is read from TOML, checked field by field, and written again.

Promise: what is unknown, missing, of the wrong type or out of range is refused by the full name of its field, with
what would be right; nothing is converted silently.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from vmferry.errors import InvalidArgumentError

SCALARS: Final = (int, str, bool)

ADDED_IN_2: Final = types.MappingProxyType({"added": 2})
"""Metadata of a field that version 1 does not have: what is left at its default is not said at all."""
ADDED_IN_3: Final = types.MappingProxyType({"added": 3})
"""The same of a field that version 2 does not have either."""
ADDED_IN_4: Final = types.MappingProxyType({"added": 4})
"""The same of a field that version 3 does not have either."""
WIDENED_IN_2: Final = types.MappingProxyType({"widened": 2})
"""Metadata of a field of which version 1 knows the default alone."""

Record = TypeVar("Record")


def invalid(key: str, fault: str, remedy: str) -> InvalidArgumentError:
    """The error for a wrong field."""
    return InvalidArgumentError(
        f"machine spec: {key}: {fault}", field=key, remedy=f"Correct {key!r}: {remedy}."
    )


def check_types(record: Any, prefix: str = "") -> None:
    """Check that every field of a dataclass holds what its annotation says."""
    for key, wanted in _hints(type(record)).items():
        _check_type(prefix + key, getattr(record, key), wanted)


def check_number(key: str, value: int, low: int, high: int) -> None:
    """Refuse a number that is out of range."""
    if not low <= value <= high:
        span = str(low) if low == high else f"between {low} and {high}"
        raise invalid(key, f"{value} is out of range", f"it must be {span}")


def check_pattern(key: str, value: str, pattern: re.Pattern[str], form: str) -> None:
    """Refuse a text that does not match as a whole."""
    if not pattern.fullmatch(value):
        raise invalid(key, f"{value!r} has the wrong form", f"it must be {form}")


def needed_version(record: Any) -> int:
    """The least version of a description that can say what this one says."""
    versions = [1]
    for field in fields(record):
        value = getattr(record, field.name)
        if value != field.default:
            versions += field.metadata.values()
        versions += [needed_version(part) for part in _parts(value)]
    return max(versions)


def canonical(record: Any) -> dict[str, Any]:
    """The description as plain values, in the form that every release that understands it computes alike."""
    found = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if "added" in field.metadata and value == field.default:
            continue
        if isinstance(value, tuple):
            value = [canonical(part) for part in value]
        elif is_dataclass(value):
            value = canonical(value)
        found[field.name] = value
    return found


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not one of a few."""
    if value not in choices:
        raise invalid(key, f"{value!r} is not supported", f"use {' or '.join(map(repr, choices))}")


def read_table(cls: type[Record], values: Mapping[str, object], prefix: str = "") -> Record:
    """Make a dataclass from a table of TOML; its own ``__post_init__`` checks what the values mean."""
    hints = {field.name: hint for field, hint in _hinted(cls) if field.init}
    for key in values:
        if key not in hints:
            raise invalid(prefix + key, "unknown key", f"known keys are {', '.join(hints)}")
    for field, _ in _hinted(cls):
        optional = not field.init or field.default is not MISSING or field.default_factory is not MISSING
        if field.name not in values and not optional:
            raise invalid(prefix + field.name, "missing", "every description needs it")
    return cls(**{key: _read(hints[key], value, prefix + key) for key, value in values.items()})


def write_table(record: Any, prefix: str = "") -> Iterator[str]:
    """The lines of TOML that :func:`read_table` reads back."""
    values = {key: getattr(record, key) for key in _hints(type(record))}
    for key, value in values.items():
        if isinstance(value, SCALARS):
            yield f"{key} = {_quote(value)}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ("", f"[{prefix}{key}]", *(f"{name} = {_quote(text)}" for name, text in value.items()))
        elif isinstance(value, tuple):
            for item in value:
                yield from ("", f"[[{prefix}{key}]]", *write_table(item, f"{prefix}{key}."))
        elif is_dataclass(value):
            yield from ("", f"[{prefix}{key}]", *write_table(value, f"{prefix}{key}."))


def _hints(cls: Any) -> dict[str, Any]:
    return {field.name: hint for field, hint in _hinted(cls)}


def _hinted(cls: Any) -> list[tuple[Field[Any], Any]]:
    """The fields of a dataclass, each with its annotation."""
    hints = get_type_hints(cls)
    return [(field, hints[field.name]) for field in fields(cls)]


def _parts(value: object) -> tuple[Any, ...]:
    """The dataclasses that a value is or holds."""
    if isinstance(value, tuple):
        return value
    return (value,) if is_dataclass(value) else ()


def _part(hint: Any) -> Any:
    """The dataclass in ``X | None`` or ``tuple[X, ...]``; ``None`` if the annotation is something else."""
    if get_origin(hint) in (types.UnionType, tuple):
        return next((item for item in get_args(hint) if is_dataclass(item)), None)
    return None


def _read(hint: Any, value: object, key: str) -> object:
    part = _part(hint)
    if part is None:
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise invalid(key, f"must be an array of tables, not {type(value).__name__}", f"use [[{key}]]")
        return tuple(_read_part(part, item, key) for item in value)
    return _read_part(part, value, key)


def _read_part(part: Any, value: object, key: str) -> object:
    if not isinstance(value, Mapping):
        raise invalid(key, f"must be a table, not {type(value).__name__}", f"use [{key}]")
    return read_table(part, value, f"{key}.")


def _check_type(key: str, value: object, wanted: Any) -> None:
    if wanted in SCALARS:
        if type(value) is not wanted:
            fault = f"must be of type {wanted.__name__}, not {type(value).__name__}"
            raise invalid(key, fault, f"give a value of type {wanted.__name__}")
        return
    part = _part(wanted)
    if part is None:
        if not isinstance(value, Mapping):
            raise invalid(key, f"must be a table, not {type(value).__name__}", "give a table of strings")
    elif get_origin(wanted) is tuple:
        if not isinstance(value, tuple) or not all(isinstance(item, part) for item in value):
            raise invalid(key, "must be an array of tables", f"use [[{key}]]")
    elif value is not None and not isinstance(value, part):
        raise invalid(key, f"must be a table, not {type(value).__name__}", f"use [{key}]")


def _quote(value: object) -> str:
    # JSON spells numbers, booleans and printable strings as TOML does, unless it escapes to ASCII.
    return json.dumps(value, ensure_ascii=False)
