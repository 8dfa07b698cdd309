"""The Jupyter server extension: installing the package enables it.

It answers at once and brings models up in the background; a problem of its own (a journal in use, a bad configuration)
is shown in the panel and never keeps the notebook server from starting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from jupyter_server.extension.application import ExtensionApp
from jupyter_server.utils import url_path_join
from traitlets import Int, Unicode

from tuft_jupyter._version import __version__
from tuft_jupyter.config import DEFAULT_HOST, DEFAULT_PORT, config_file, load_settings
from tuft_jupyter.config.reader import ConfigError
from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.home import KEY_PREFIX
from tuft_jupyter_server import lab, lab_calls, logs, logtail, misconfigured, relay, tinker
from tuft_jupyter_server.host import Host

ACTIVITY_SECONDS = 10.0
"""How often a server that works on something says so."""
INJECTED = ("TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY")


class TuftExtension(ExtensionApp):
    """``jupyter server`` with the Tinker API below ``<base url>/tuft/api/v1``."""

    name = "tuft_jupyter"
    version = __version__
    description = "Fine-tuning as a notebook primitive: the Tinker API on your notebook server"
    load_other_extensions = True

    config_path = Unicode(
        "", help="YAML configuration file (like TUFT_CONFIG). Without one, tuft/demo is offered."
    ).tag(config=True)
    checkpoint_dir = Unicode("", help="Where checkpoints are kept (default: $TUFT_HOME/checkpoints).").tag(
        config=True
    )
    max_lora_rank = Int(0, help="The largest LoRA rank a run may have (0: as configured).").tag(config=True)
    cuda_visible_devices = Unicode(
        "", help="GPUs that are used, as CUDA_VISIBLE_DEVICES names them (default: as that variable says)."
    ).tag(config=True)

    def initialize_settings(self) -> None:
        overrides: dict[str, Any] = {}
        if self.checkpoint_dir:
            overrides["checkpoint_dir"] = self.checkpoint_dir
        if self.max_lora_rank:
            overrides["max_lora_rank"] = self.max_lora_rank
        if self.cuda_visible_devices:
            overrides["cuda_visible_devices"] = self.cuda_visible_devices
        if any("log_level" in self.config.get(name, {}) for name in self.section_names()):
            overrides["log_level"] = logging.getLevelName(level_of(self.log_level))
        logtail.listen()
        self.problem = ""
        self._activity: asyncio.Task[None] | None = None
        try:
            file = config_file(os.environ, self.config_path)
            settings = load_settings(file, os.environ, overrides)
            self.log_level = level_of(settings.log_level)
            logs.join(self.log, self.log_level)
            for note in settings.notes:
                self.log.warning("tuft-jupyter: %s", note)
            if (settings.host, settings.port) != (DEFAULT_HOST, DEFAULT_PORT):
                where = f"{settings.host}:{settings.port}"
                self.log.warning("host and port (%s) have no effect: the notebook server listens", where)
            self.host = Host(settings)
        except (ConfigError, TuftError, OSError) as error:
            self.problem = str(error)
            self.log.error("tuft-jupyter is not serving: %s", self.problem)

    def initialize_handlers(self) -> None:
        root = r"/tuft"
        if self.problem:
            self.handlers.extend(misconfigured.handlers(root, self.problem))
            return
        service = shared_service()
        if service is None:
            self.handlers.extend(lab.handlers(root, self.host))
            self.handlers.extend(lab_calls.handlers(root, self.host))
        else:  # what the user trains is there, and so is what the panel shows
            self.handlers.extend(relay.handlers(root, self.host, relay.HubService(*service)))
        self.handlers.extend(tinker.rules(root, self.host))

    async def _start_jupyter_server_extension(self, serverapp: Any) -> None:
        if self.problem:
            return
        tell_kernels(self.host, serverapp)  # first: a kernel may be started from now on
        self.host.answers_at(address_of(serverapp))
        await self.host.start()
        self._activity = asyncio.get_running_loop().create_task(count_as_activity(self.host, self.settings))

    async def stop_extension(self) -> None:
        if self._activity is not None:
            self._activity.cancel()
        if not self.problem:
            await self.host.stop()


def level_of(name: object) -> int:
    """A log level as Jupyter or a setting of ours names it, as its number."""
    return name if isinstance(name, int) else logging.getLevelNamesMapping()[str(name).upper()]


async def count_as_activity(host: Host, settings: dict[str, Any]) -> None:
    """Training keeps the server from being culled as idle, also in an op that takes hours; looking does not."""
    subscription = host.ledger.feed.subscribe(None)
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ACTIVITY_SECONDS):
                await subscription.take()
                settings["last_activity_times"]["tuft_jupyter"] = datetime.now(UTC)
        if host.ledger.state.accepted:
            settings["last_activity_times"]["tuft_jupyter"] = datetime.now(UTC)
        await asyncio.sleep(ACTIVITY_SECONDS / 10)


def address_of(serverapp: Any) -> str:
    """Where clients on this machine reach our routes."""
    parts = urlsplit(serverapp.local_url)
    return urlunsplit((parts.scheme, parts.netloc, url_path_join(serverapp.base_url, "tuft"), "", ""))


def _chosen_by_user() -> bool:
    return bool(os.environ.get("TUFT_ADDRESS") or os.environ.get("TINKER_BASE_URL"))


def shared_service() -> tuple[str, str] | None:
    """Address and key of the Hub's shared service, if there is one: whom a Hub token speaks for is known there."""
    service, token = os.environ.get("TUFT_HUB_SERVICE"), os.environ.get("JUPYTERHUB_API_TOKEN")
    if _chosen_by_user() or not service or not token:
        return None
    return service.rstrip("/"), KEY_PREFIX + token


def tell_kernels(host: Host, serverapp: Any) -> None:
    """Put this server's address and key where the kernels it starts inherit them.

    What the user set is left alone: a TUFT_ADDRESS or TINKER_BASE_URL of theirs names another server on purpose.
    """
    if _chosen_by_user():
        return
    address, key = shared_service() or (address_of(serverapp), host.key)
    os.environ.update(zip(INJECTED, (address, key, address, key), strict=True))
    named = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    proxies = any(os.environ.get(name) or os.environ.get(name.lower()) for name in named)
    exempt = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    if proxies and "127.0.0.1" not in exempt:  # a proxy would be asked for our own loopback address
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(
            filter(None, [exempt, "127.0.0.1,localhost"])
        )


main = TuftExtension.launch_instance
