"""Plain data to the frozen classes of `config.py`, strictly, and back.

An unknown key is refused with the nearest valid name and never "corrected"; so is a value of
another type.

Does not cover: defaults and what a value means.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rx_edge.errors import ConfigError

T = TypeVar("T")


def load_toml(path: Path, cls: type[T]) -> T:
    """Read a TOML recipe into `cls`.

    Raises:
        ConfigError: missing file, bad TOML, unknown key or a value of the wrong type.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid TOML: {error}") from error
    return from_mapping(cls, raw, where=str(path))


def from_mapping(cls: type[T], raw: Mapping[str, Any], *, where: str) -> T:
    """Build the dataclass `cls` from plain data, refusing what it does not know.

    Args:
        where: what to name in an error: a file, then the path of the table inside it.

    Raises:
        ConfigError: an unknown key (the nearest valid name is given) or a wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"{where}: unknown key {key!r}; did you mean {near[0]!r}? "
                f"valid keys: {', '.join(names)}"
            )
        values[key] = _coerce(hints[key], value, f"{where}: {key}")
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain JSON-ready data of a config dataclass; the inverse of `from_mapping`.

    A field with `since` in its metadata, younger than files that exist, is written only where it
    is not at its default: hashes over older settings stay what they are, and an older rx-edge
    reads what it can run.
    """
    plain: dict[str, Any] = {}
    for known in dataclasses.fields(config):
        value = getattr(config, known.name)
        if "since" not in known.metadata or value != known.default:
            plain[known.name] = _plain(value)
    return plain


def override(config: T, changes: Sequence[str], *, where: str) -> T:
    """`config` with "key.sub=value" changes applied; values are TOML, a bare word is a string.

    Raises:
        ConfigError: unknown key, wrong type, or a change that is not key=value.
    """
    plain = to_mapping(config)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change!r}: expected key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        _set(plain, key.split("."), value, change)
    return from_mapping(type(config), plain, where=where)


def _set(plain: Any, keys: list[str], value: Any, change: str) -> None:
    for key in keys[:-1]:
        try:
            plain = plain[int(key)] if isinstance(plain, list) else plain[key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ConfigError(f"--set {change!r}: there is no {key!r} in the recipe") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"--set {change!r}: {keys[-1]!r} is no key there")
    plain[keys[-1]] = value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}; valid: {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{where} is {value!r}; a list is expected")
        if args[-1] is Ellipsis:
            return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{where} has {len(value)} entries; {len(args)} are expected")
        return tuple(_coerce(a, v, where) for a, v in zip(args, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; a table is expected")
        return {k: _coerce(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; a table is expected")
        return from_mapping(typing.cast(type[Any], hint), value, where=where)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r}; {hint.__name__} is expected")
    return value
