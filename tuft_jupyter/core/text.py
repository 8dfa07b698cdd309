"""Text from a model by its name: answers in OpenAI's form, piece by piece, for every client of a tenant.

A model's name is that of a base model, a checkpoint path (the tenant's own or a published one), a sampler id, or a run
id, which stands for what the run saved last. The module finds the weights, sees to it that the sampling worker is up,
and passes bytes on; it looks into none of them.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from tuft_jupyter.core.access import owned
from tuft_jupyter.core.checkpoints import Checkpoints
from tuft_jupyter.core.engine import EngineDied, Part, TextTask
from tuft_jupyter.core.errors import NotFound, ServerError, UserError, failure
from tuft_jupyter.core.sampling import Sampling
from tuft_jupyter.core.types import RUN_INFIX, SAMPLER_INFIX, CheckpointKind, ModelCard, Principal

log = logging.getLogger("tuft_jupyter.text")

SAMPLED_KINDS = (CheckpointKind.TRAINING.value, CheckpointKind.SAMPLER.value)


@dataclass(frozen=True, slots=True)
class Offered:
    """A model that can be named. ``created`` is in seconds since the epoch, 0 for a base model."""

    name: str
    owner: str
    created: float = 0.0


class Text:
    def __init__(self, sampling: Sampling, checkpoints: Checkpoints) -> None:
        self.sampling = sampling
        self.checkpoints = checkpoints

    def models(self, principal: Principal) -> list[Offered]:
        """The base models, then the principal's checkpoints, newest first."""
        cards = [Offered(card.name, "tuft") for card in self.sampling.catalog.cards()]
        saved = [c for c in self.checkpoints.mine(principal) if c.kind in SAMPLED_KINDS]
        return cards + [Offered(c.path, c.tenant, c.created) for c in saved]

    def find(self, principal: Principal, name: str) -> tuple[ModelCard, str | None]:
        """The base model and the adapter's directory that a name stands for; NotFound if it is not the principal's."""
        catalog, state = self.sampling.catalog, self.sampling.ledger.state
        if name.startswith("tinker://"):
            checkpoint = self.checkpoints.readable(principal, name)
            base, directory = checkpoint.base_model, checkpoint.directory
        elif SAMPLER_INFIX in name:
            sampler = self.sampling.get(principal, name)
            base, found = sampler.base_model, sampler.directory
            if found is None:
                return catalog.resolve(base), None
            directory = found
        elif RUN_INFIX in name:
            run = owned(principal, state.runs, name, "model")
            saved = [c for c in state.checkpoints.values() if c.run == run.id and c.kind in SAMPLED_KINDS]
            if not saved:
                raise NotFound(
                    f"model {name!r} has saved no weights yet: call save_weights_for_sampler first"
                )
            newest = max(saved, key=lambda checkpoint: checkpoint.created)
            base, directory = newest.base_model, newest.directory
        else:
            try:
                return catalog.resolve(name), None
            except UserError as error:
                raise NotFound(f"model: {error.message}; or name a checkpoint, tinker://...") from None
        if not Path(directory).is_dir():
            raise NotFound(f"the weights of {name!r} are not on disk any more: save them again")
        return catalog.resolve(base), directory

    async def complete(
        self, principal: Principal, model: str, body: bytes, *, chat: bool, input_tokens: int = 0
    ) -> AsyncGenerator[bytes, None]:
        """The chunks of the answer as they are drawn, or the whole as one; closing the iterator stops the drawing.

        ``input_tokens`` bounds the prompts (0: not at all).
        """
        card, directory = self.find(principal, model)
        task = TextTask(secrets.token_hex(12), directory, body, chat, principal.tenant, input_tokens)
        with self.sampling.room(principal.tenant, len(body)):
            async with aclosing(self._parts(card, task)) as parts:
                async for part in parts:
                    if part.facts:  # before its chunks: who wants only one does not come back
                        self.sampling.usage.add(principal.tenant, "", card.name, part.facts)
                    for chunk in part.chunks:
                        yield chunk
                    if part.category:
                        raise failure(part.category, part.error)

    async def _parts(self, card: ModelCard, task: TextTask) -> AsyncGenerator[Part, None]:
        """Those of one engine; of a second one if the first dies before it has answered."""
        worker = self.sampling.worker(card)
        for last in (False, True):
            begun = False
            try:
                with worker.in_use():
                    await worker.ready()
                    async with aclosing(worker.engine.complete(task)) as parts:
                        async for part in parts:
                            begun = True
                            yield part
                return
            except EngineDied as death:
                log.warning("the sampling worker of %s died: %s", card.name, death)
                worker.lost()
                if begun or last:
                    raise ServerError("the sampling worker died during this request: send it again") from None
