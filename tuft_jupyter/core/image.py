"""The image of a state: everything it holds as JSON, from which the same state can be made again.

It stands in the journal for the records before it. Fields and curve columns that a later version added get their
defaults; fields that it dropped are ignored.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from tuft_jupyter.core.curve import WHOLE, Column
from tuft_jupyter.core.objects import CURVE_COLUMNS, State

_PLAIN = (str, int, float, bool, type(None))


def plain(value: Any) -> Any:
    """Dataclasses, dicts, lists and sets as JSON values. A copy: it may be encoded while the original goes on."""
    if isinstance(value, _PLAIN):
        return value
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if not value or isinstance(value[0], _PLAIN):  # a curve: many numbers
        return list(value)
    return [plain(inner) for inner in value]


def state_of(image: Mapping[str, Any]) -> State:
    """The state whose image this is."""
    made: State = _build(State, image)
    for run in made.runs.values():
        for name in CURVE_COLUMNS:
            told = run.curve.get(name) or [None] * len(run.curve["step"])
            run.curve[name] = Column(told, whole=name in WHOLE)
    return made


def _build(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not types.NoneType)
    if value is None:
        return None
    origin = get_origin(hint)
    if origin is dict:
        (_, inner) = get_args(hint)
        return {key: _build(inner, each) for key, each in value.items()} if is_dataclass(inner) else value
    if origin is set:
        return set(value)
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        return hint(**{name: _build(hints[name], each) for name, each in value.items() if name in hints})
    return value
