"""The daemon: the same API without a notebook server, for shared machines, scripts and CI.

``serve`` blocks until SIGTERM, SIGINT, or until the process that owns it is gone (``TUFT_OWNER_FD``: a pipe whose
other end the owner holds; it closes however the owner ends).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import signal

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from tuft_jupyter.config import Settings
from tuft_jupyter.home import reached_at, remove_address, write_address
from tuft_jupyter_server import logs, tinker
from tuft_jupyter_server.host import Host

log = logging.getLogger("tuft_jupyter.daemon")

OWNER_FD = "TUFT_OWNER_FD"
BELOW_NOTHING = "(?:/tuft)?"
"""The pattern of a server that has no prefix: with and without this one, so that an address is right however it is
spelled."""


def serve(settings: Settings) -> None:
    """Serve until told to stop. OSError with the port's number if it is taken."""
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    await serve_host(Host(settings))


async def serve_host(host: Host, prefix: str = "") -> None:
    """Serve a host below a prefix until told to stop, where its settings say. OSError if that cannot be."""
    settings = host.settings
    logs.configure(settings.log_level, settings.log_format)
    leave_no_core()
    try:
        sockets = bind_sockets(settings.port, settings.host)
    except OSError as error:
        raise OSError(
            f"port {settings.port} on {settings.host} cannot be used ({error.strerror or error}): "
            "choose another with --port, or stop the program that uses it"
        ) from None
    limit = settings.max_body_bytes
    rules = tinker.rules(re.escape(prefix) or BELOW_NOTHING, host)
    server = HTTPServer(Application(rules), max_buffer_size=limit + 2**20, max_body_size=limit + 2**20)
    server.add_sockets(sockets)
    address = reached_at(settings.host, sockets[0].getsockname()[1])
    if settings.host not in ("", "0.0.0.0", "::"):  # a name that holds from other machines too
        host.answers_at(address + prefix)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stopping.set)
    _watch_owner(stopping)
    starting, told = asyncio.ensure_future(host.start()), asyncio.ensure_future(stopping.wait())
    await asyncio.wait((starting, told), return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        await starting
        if host.problem and not host.journal.elsewhere:
            server.stop()
            raise OSError(host.problem)
        write_address(settings.home, address)
        log.info("serving at %s", address)
        await told
    else:  # a long journal need not be read for a server that nobody wants any more
        starting.cancel()
        await asyncio.wait((starting,))
    log.info("stopping")
    remove_address(settings.home, address)
    server.stop()
    await host.stop()
    await server.close_all_connections()


def leave_no_core() -> None:
    """A crash writes no core file, of this process or a worker it starts: keys and prompts would be in it."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


def _watch_owner(stopping: asyncio.Event) -> None:
    """Stop when the owner's end of the pipe closes."""
    number = os.environ.pop(OWNER_FD, "")
    if not number.isdecimal():
        return
    descriptor = int(number)

    def gone() -> None:
        if not os.read(descriptor, 4096):
            loop.remove_reader(descriptor)
            stopping.set()

    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, gone)
