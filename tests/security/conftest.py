from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.fuzz import Bystander, Target
from tests.support.scene import Body, OnScene, Scene


@pytest.fixture(scope="module")
def on_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnScene]:
    """Runs a test body on one server for the whole module; the bystander is looked at after each."""
    with asyncio.Runner() as runner:
        target = Target(tmp_path_factory.mktemp("home"))

        async def begin() -> Scene:
            await target.host.start()
            bystander = Bystander(target)
            await bystander.start()
            return Scene(target, await target.world(), bystander)

        scene = runner.run(begin())

        def run(body: Body) -> None:
            async def whole() -> None:
                await body(scene)
                assert await scene.bystander.look() == ""

            runner.run(whole())

        yield run
        target.http.stop()
        runner.run(target.host.stop())
