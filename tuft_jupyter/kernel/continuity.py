"""Going on after a pause: what ran meanwhile, and a training client at a run's next step.

Training lives in the server, so a kernel that was restarted only needs to find its run again. A run that is still live
is taken over as it is: the same model id, the next request number, whatever is queued stays queued. One that is gone
is loaded from its newest saved state into a new run. The SDK is imported by :func:`resume` alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tuft_jupyter.kernel import connect
from tuft_jupyter.kernel.client import Client
from tuft_jupyter.kernel.errors import TuftConnectionError, in_a_sentence
from tuft_jupyter.kernel.report import Progress
from tuft_jupyter.kernel.versions import SDK_REQUIREMENT, sdk_version

GONE = ("failed", "closed")
Report = Callable[[str, str], None]


def connected() -> connect.Connection:
    """The connection of this kernel; made now if there is none yet."""
    if connect.current() is None:
        connect.init(report=lambda phase, text: None)
    found = connect.current()
    assert found is not None
    return found


def runs(client: Client | None = None, tenant: str = "") -> list[dict[str, Any]]:
    """This user's runs, the one that was busy last first; for an admin's key also another ``tenant``'s, or all (*).

    Each is a dict: ``id``, ``base_model``, ``rank``, ``status``, ``step``, ``loss`` (nats per weighted token, or
    None), ``tokens_per_second``, ``pending`` (requests without an answer), ``why`` (in words, what it waits for),
    ``created`` and ``last_request`` (seconds since 1970).
    """
    client = client or connected().client
    with in_a_sentence(client):
        found: list[dict[str, Any]] = client.outlook(tenant=tenant)["runs"]
    return sorted(found, key=lambda run: -max(run["last_request"], run["created"]))


def short(run: str) -> str:
    """The form of a run's id that is shown and understood: the head of its session and its number."""
    session, _, number = run.partition(":train:")
    return f"{session[:8]}:{number}" if number else run


def find(client: Client, name: str | None) -> dict[str, Any]:
    """The run that is meant by an id, its short form or its beginning; by nothing, the one that was busy last."""
    known = runs(client)
    if name is None and known:
        return known[0]
    wanted = (name or "").removeprefix("tinker://").split("/")[0]
    matching = [run for run in known if wanted in (run["id"], short(run["id"]))]
    matching = matching or [run for run in known if run["id"].startswith(wanted)]
    if len(matching) == 1:
        return matching[0]
    if not known:
        raise TuftConnectionError(
            f"There is no run of yours at {client.address} yet; "
            "tuft_jupyter.create_training_client(rank=8).result() starts one."
        )
    listed = ", ".join(short(run["id"]) for run in (matching or known)[:5])
    what = f"{name!r} could be any of" if matching else f"{name!r} is no run of yours; you have"
    raise TuftConnectionError(f"{what} {listed} (`%tuft runs` lists them).")


def resume(run: str | None = None, report: Report | None = None) -> Any:
    """The SDK's ``TrainingClient`` of a run, at its next step; without a name, of the run that was busy last.

    A live run goes on as it is, and what it was asked before is done first. A run that was unloaded, or that the
    server lost, is loaded from its newest saved state into a new run, with its optimizer where that was saved.
    TuftConnectionError if there is nothing to go on from.
    """
    report = report or Progress("TuFT resume")
    connection = connected()
    client = connection.client
    found = find(client, run)
    with _of_the_sdk():
        return (_reload if found["status"] in GONE else _taken_over)(client, found, report)


@contextmanager
def _of_the_sdk() -> Iterator[None]:
    """What the SDK raises, in a sentence: the server's own words, where it has some."""
    try:
        yield
    except Exception as error:
        sdk = sys.modules.get("tinker")
        if sdk is None or not isinstance(error, sdk.TinkerError):
            raise
        said = getattr(error, "body", None)
        words = said.get("detail") if isinstance(said, dict) else None
        raise TuftConnectionError(f"The SDK cannot go on with it: {words or error}.") from None


def _taken_over(client: Client, found: dict[str, Any], report: Report) -> Any:
    report("run", f"{short(found['id'])} on {found['base_model']}: finding its next step ...")
    make = _maker()  # before the run is taken from where it is
    service = connect.get_service_client()
    began = time.monotonic()
    with in_a_sentence(client):
        taken = client.resume(found["id"], service.holder.get_session_id())
    training = make(service, taken["model_id"], taken["next_seq"])
    queued = f"; {taken['pending']} requests of before come first" if taken["pending"] else ""
    report("run", f"{short(found['id'])} on {found['base_model']}")
    report("resumed", f"at step {taken['step']} in {time.monotonic() - began:.1f} s{queued}")
    return training


def _maker() -> Callable[[Any, str, int], Any]:
    """A function that makes a stock training client of an existing model, whose first request has a given number.

    The SDK makes such clients for new models only; what it counts with are these two fields (SDK 0.38).
    TuftConnectionError if this one is of another make.
    """
    try:
        from tinker.lib.public_interfaces.training_client import TrainingClient, fetch_training_info
    except ImportError:
        raise TuftConnectionError(
            f"tinker {sdk_version()} cannot go on with a live run: "
            f'%pip install "{SDK_REQUIREMENT}", restart the kernel and run the cell again.'
        ) from None

    def make(service: Any, model_id: str, next_seq: int) -> Any:
        holder = service.holder
        info = holder.run_coroutine_threadsafe(fetch_training_info(holder, model_id)).result()
        training = TrainingClient(holder, holder.get_training_client_id(), model_id, info=info)
        training._request_id_counter = training._turn_counter = next_seq - 1
        return training

    return make


def _reload(client: Client, run: dict[str, Any], report: Report) -> Any:
    with in_a_sentence(client):
        saved = [c for c in client.outlook()["checkpoints"] if c["run"] == run["id"]]
    whole = [c for c in saved if c["kind"] == "weights"]
    usable = whole or [c for c in saved if c["kind"] == "sampler_weights"]
    if not usable:
        raise TuftConnectionError(
            f"Run {short(run['id'])} cannot go on ({run['why']}) and has no saved state; "
            "save one now and then with training.save_state(name)."
        )
    newest = max(usable, key=lambda c: c["created"])
    report("loading", f"{newest['path']} (step {newest['step']}) into a new run ...")
    service = connect.get_service_client()
    began = time.monotonic()
    if whole:
        training = service.create_training_client_from_state_with_optimizer(newest["path"]).result()
    else:
        report("note", "only its weights were saved: the optimizer begins afresh")
        training = service.create_training_client_from_state(newest["path"]).result()
    report("loading", f"{newest['path']} in {time.monotonic() - began:.1f} s")
    step = newest["step"] if whole else 0
    report("resumed", f"as {short(training.model_id)} at step {step}; {short(run['id'])} had ended")
    return training
