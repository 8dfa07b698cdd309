"""Versions that must fit: the SDK in the kernel's environment, and tuft-jupyter here and in the server's.

Kernel and server often live in different environments. What differs is said with the command that mends it; only what
cannot work is refused. Versions come from package metadata, so nothing is imported.
"""

from __future__ import annotations

import importlib.metadata
import re

from tuft_jupyter._version import __version__

SDK_REQUIREMENT = "tinker>=0.38,<0.39"
OLDEST, NEWEST = (0, 16), (0, 38)
"""The SDK versions that were tried, by minor version (``make sdk-matrix``)."""


def sdk_version() -> str | None:
    """The installed Tinker SDK; None if there is none."""
    try:
        return importlib.metadata.version("tinker")
    except importlib.metadata.PackageNotFoundError:
        return None


def sdk_refusal(version: str | None) -> str:
    """Why the SDK cannot be used, with the command that mends it; empty if it can."""
    mend = f'%pip install "{SDK_REQUIREMENT}", restart the kernel and run the cell again.'
    if version is None:
        return f"The Tinker SDK is not installed in this kernel's environment: {mend}"
    if _parts(version) < OLDEST:
        return f"tinker {version} is too old for this server (it knows 0.16 and later): {mend}"
    return ""


def sdk_note(version: str | None) -> str:
    """What is better known of an SDK version: too old to work, or newer than was tried; empty if it is neither."""
    if version and _parts(version) > NEWEST:
        return (
            f"tinker {version} is newer than any that this version was tried with; "
            f'if something fails: %pip install "{SDK_REQUIREMENT}"'
        )
    return sdk_refusal(version) if version else ""


def notes(version: str | None, server: str) -> list[str]:
    """What works, but is better known: an untried SDK, another tuft-jupyter in the server's environment."""
    return [
        text for text in (sdk_note(version), difference("the server runs", server, "this kernel")) if text
    ]


def difference(there: str, version: str | None, here: str) -> str:
    """That two environments have different tuft-jupyters, with the command that mends it; empty if they do not."""
    if not version or _parts(version) == _parts(__version__):
        return ""
    return (
        f"{there} tuft-jupyter {version}, {here} {__version__}: "
        "pip install --upgrade tuft-jupyter in the environment of the older one"
    )


def _parts(version: str) -> tuple[int, ...]:
    """(major, minor)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
