"""The one way in which the kernel side fails: a sentence that says what happened and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tuft_jupyter.kernel.client import Client, Refused, Unreachable


class TuftConnectionError(RuntimeError):
    """No server could be found, started or used. In a notebook it shows as its message, without a
    traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


@contextmanager
def in_a_sentence(client: Client) -> Iterator[None]:
    """What goes wrong between us and a server, as a :class:`TuftConnectionError`."""
    try:
        yield
    except Refused as error:
        if error.status == 404 and "no such path" in str(error):
            raise TuftConnectionError(
                f"The server at {client.address} does not know this command: it is of another version or make; "
                "upgrade tuft-jupyter in its environment and restart it."
            ) from None
        if error.status == 401 or (error.status == 403 and "Invalid API key" in str(error)):
            raise TuftConnectionError(
                f"The TuFT server at {client.address} refuses this key ({error}): set TUFT_API_KEY to a key of "
                "that server, then `%tuft shutdown` and `%tuft init`."
            ) from None
        raise TuftConnectionError(f"The TuFT server refuses: {str(error).rstrip('.')}.") from None
    except Unreachable as error:
        raise TuftConnectionError(
            f"The TuFT server at {client.address} does not answer ({error}). If it was restarted, "
            "run the cell again; otherwise `%tuft shutdown` and `%tuft init` connect anew."
        ) from None
