"""The base models of a server, as a kernel sees them: have one served, wait for it, lay its tokenizer.

It knows our own routes and the tokenizer cache. What fails is told in a sentence; what merely does not work
as well as it could (no tokenizer, an unreachable hub) comes back as notes and stops nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tuft_jupyter.config import DEMO_MODEL, model_name_of
from tuft_jupyter.kernel import hub, tokenizers
from tuft_jupyter.kernel.client import Client, Refused, Unreachable
from tuft_jupyter.kernel.errors import TuftConnectionError

Report = Callable[[str, str], None]

LOAD_SECONDS = 1800.0
IDLE_SECONDS = 3.0
POLL_SECONDS = 0.2


def serve(client: Client, model: str) -> str:
    """The name under which the server offers ``model``; asks it to add the model if need be."""
    path = Path(model).expanduser()
    asked = str(path.resolve()) if path.is_dir() else model
    try:
        return client.add_model(asked)
    except Refused as error:
        offered = client.models()
        if model_name_of(model) in offered:
            return model_name_of(model)
        why = "it is no TuFT server that can add models" if error.status == 404 else str(error)
        raise TuftConnectionError(
            f"The server at {client.address} cannot serve {model}: {why}. "
            f"It offers: {', '.join(offered) or 'nothing yet'}."
        ) from None


def wait_until_ready(client: Client, model: str, report: Report) -> None:
    """Return when a model is loaded; what it waits for is reported. TuftConnectionError if loading failed."""
    began = time.monotonic()
    while True:
        try:
            states = {each["name"]: each for each in client.status()["models"]}
        except Refused as error:
            if error.status != 404:
                raise
            return  # a Tinker server of another make: it loads when it is asked
        state: dict[str, str] = states.get(model, {})
        seconds = time.monotonic() - began
        match state.get("state"):
            case "failed":
                raise TuftConnectionError(
                    f"{model} cannot be loaded: {state.get('detail') or 'see the server log'}."
                )
            case "ready":
                report("model", f"{model} is loaded after {seconds:.1f} s")
                return
            case "loading" if seconds > LOAD_SECONDS:
                raise TuftConnectionError(
                    f"{model} was not loaded within {LOAD_SECONDS:.0f} s; see `%tuft status`."
                )
            case "loading":
                report("model", f"{state.get('detail') or f'loading {model}'} ...")
            case _ if seconds > IDLE_SECONDS:  # offered, and loaded when it is first used
                return
        time.sleep(POLL_SECONDS)


def lay_tokenizers(client: Client, models: list[str]) -> list[str]:
    """Make ``get_tokenizer()`` work for these models; what does not work comes back as sentences."""
    notes, laid = [], []
    for model in models:
        repository = tokenizers.repository(model)
        try:
            files = client.tokenizer(model)
            if repository is None:
                notes.append(
                    f"get_tokenizer() does not find a tokenizer for {model!r}, which is no name of a repository; "
                    "load it with transformers.AutoTokenizer.from_pretrained and a directory"
                )
            elif tokenizers.lay(repository, files, tokenizers.cache_dir()):
                laid.append(repository)
            else:
                notes.append(
                    f"the Hugging Face cache holds another {repository}; get_tokenizer() uses that one, "
                    f"not the one the server trains {model} with"
                )
        except (Refused, Unreachable) as error:
            if not (isinstance(error, Refused) and error.status == 404):
                notes.append(f"the server has no tokenizer for {model}: {error}")
        except (OSError, ValueError) as error:
            notes.append(f"the tokenizer of {model} could not be laid into {tokenizers.cache_dir()}: {error}")
    unkept = hub.keep_local(laid)
    return [*notes, unkept] if unkept else notes


def only_model(client: Client) -> str:
    """The model that is meant when none is named: the only one, or the demo model."""
    offered = client.models()
    if len(offered) == 1 or offered[:1] == [DEMO_MODEL]:
        return offered[0]
    raise TuftConnectionError(
        f"Say which base model: base_model= one of {', '.join(offered) or '(none offered)'}."
    )
