"""From a parsed document (YAML, environment, flags) to the fields of a dataclass, with errors that say where.

Knows text, numbers, true and false, paths, maps of text to text, dataclasses and lists of dataclasses; knows
nothing of what the fields mean. Promises: nothing is dropped and nothing is guessed. An unknown key, a missing key
or a value of the wrong type is a :class:`ConfigError` that names the source, the place in it, and what would be right.
"""

from __future__ import annotations

import contextlib
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

WANTED = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}
SAID = {"true": True, "1": True, "false": False, "0": False}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, what and how to mend it."""


@dataclass(frozen=True, slots=True)
class Reader:
    """``source`` is how errors call the document; relative paths are taken from ``base``.

    ``text`` allows numbers, true and false written as text, as the environment and the command line have them.
    """

    source: str
    base: Path
    text: bool = False

    def read(
        self,
        cls: type,
        document: Any,
        place: str = "",
        without: frozenset[str] = frozenset(),
        also: tuple[str, ...] = (),
    ) -> Any:
        """The keys of ``document`` as converted keyword arguments of ``cls``; what is not given stays out.

        ``also`` are keys that would have been known elsewhere: somebody may have meant one of them.
        """
        if not isinstance(document, Mapping):
            raise self.error(place or "the document", f"must hold keys and values, not {document!r}")
        hints = {name: hint for name, hint in get_type_hints(cls).items() if name not in without}
        values = {}
        for key, value in document.items():
            inner = f"{place}.{key}" if place else str(key)
            if key not in hints:
                raise ConfigError(
                    f"{self.source}: unknown key {inner!r}{_nearest(str(key), [*hints, *also])}"
                )
            values[key] = self._value(hints[key], value, inner)
        return values

    def build(self, cls: Any, document: Any, place: str) -> Any:
        """An instance of ``cls``; its own checks (ConfigError from ``__post_init__``) are told with the
        place.
        """
        if isinstance(document, cls):
            return document
        values = self.read(cls, document, place)
        for each in fields(cls):
            if each.default is MISSING and each.default_factory is MISSING and each.name not in values:
                raise ConfigError(f"{self.source}: {place} lacks {each.name!r}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{self.source}: {place}.{error}") from None

    def error(self, place: str, message: str) -> ConfigError:
        return ConfigError(f"{self.source}: {place} {message}")

    def _value(self, hint: Any, value: Any, place: str) -> Any:
        if get_origin(hint) is types.UnionType:
            if value is None:
                return None
            hint = next(each for each in get_args(hint) if each is not type(None))
        if get_origin(hint) is tuple:
            if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
                raise self.error(place, "must be a list, with each entry beginning '- '")
            inner = get_args(hint)[0]
            each_as = self.build if is_dataclass(inner) else self._plain
            return tuple(each_as(inner, each, f"{place}[{n}]") for n, each in enumerate(value))
        if is_dataclass(hint):
            return self.build(hint, {} if value is None else value, place)
        if get_origin(hint) is Mapping:
            if not isinstance(value, Mapping) or not all(
                isinstance(v, str) for kv in value.items() for v in kv
            ):
                raise self.error(place, "must map text to text; put keys and names in quotes")
            return dict(value)
        return self._plain(hint, value, place)

    def _plain(self, hint: Any, value: Any, place: str) -> Any:
        if hint is Path and isinstance(value, str | Path) and str(value):
            return self.base / Path(value).expanduser()
        if hint is str and isinstance(value, str):
            return value
        if hint is bool:
            if isinstance(value, bool):
                return value
            if self.text and str(value).lower() in SAID:
                return SAID[str(value).lower()]
        numbers = (int,) if hint is int else (int, float)
        if hint in (int, float) and not isinstance(value, bool):
            if isinstance(value, numbers):
                return hint(value)
            if self.text and isinstance(value, str):
                try:
                    return hint(value)
                except ValueError:
                    pass
        raise self.error(place, f"must be {WANTED[hint]}, not {value!r}")


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"


def at_least(name: str, value: float | None, least: int) -> None:
    """ConfigError if a number is too small, or not one (``.nan``); None is none."""
    if value is not None and not value >= least:
        raise ConfigError(f"{name} must be at least {least}, not {value}")


@contextlib.contextmanager
def usable(name: str, path: Path) -> Iterator[None]:
    """ConfigError that names the setting, where its path cannot be made or opened."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{name}: {path} cannot be used ({error.strerror}); name a place that this user may write to"
        ) from None


def web_address(name: str, text: str) -> None:
    """ConfigError unless a text is empty, or an http or https address without a query."""
    plain = text.isascii() and text.isprintable() and " " not in text
    try:
        parts = urlsplit(text)
        plain = plain and not parts.query + parts.fragment and parts.port != 0
        plain = plain and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # half of an IPv6 address, a port that is none
        plain = False
    if text and not plain:
        raise ConfigError(f"{name} must be an address such as https://gpu.example.org/tuft, not {text!r}")
