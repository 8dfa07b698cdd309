"""The base models that one server offers: those of its configuration, and those added since.

A server without a configuration file always offers the demo model too.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from tuft_jupyter import models
from tuft_jupyter.config import Settings
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.types import ModelCard

log = logging.getLogger("tuft_jupyter.catalog")


class ServerCatalog:
    """Implements :class:`tuft_jupyter.core.engine.Catalog`; added models are read from the ledger's state."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._ledger = ledger
        self._backends = settings.backends
        self._configured = [
            replace(
                self._served(_card(model.model_name, model.model_path, model.max_model_len)),
                max_rank=settings.rank_limit(model.model_name),
            )
            for model in settings.supported_models
        ]
        if settings.file is None and models.DEMO not in {card.name for card in self._configured}:
            self._configured.append(self._served(models.resolve(models.DEMO)))
        self._added: dict[str, ModelCard] = {}

    def cards(self) -> list[ModelCard]:
        known = {card.name for card in self._configured}
        for name, path in self._ledger.state.models.items():
            if name not in known and name not in self._added:
                self._added[name] = self._served(_card(name, path, None))
        return [*self._configured, *self._added.values()]

    def resolve(self, name: str) -> ModelCard:
        cards = self.cards()
        for card in cards:
            if name in (card.name, card.path):
                return card
        offered = ", ".join(card.name for card in cards)
        raise UserError(f"Base model {name!r} is not supported. Supported models: {offered}")

    def find(self, name: str) -> ModelCard:
        try:
            return models.resolve(name)
        except UserError as error:
            offered = ", ".join(card.name for card in self.cards())
            raise UserError(
                f"Base model {name!r} is not supported. Supported models: {offered}. ({error.message})"
            ) from None

    def _served(self, card: ModelCard) -> ModelCard:
        """With what this server does with any model."""
        trainable, sampleable = self._backends.trainer is not None, self._backends.sampler is not None
        return replace(card, trainable=trainable, sampleable=sampleable)


def _card(name: str, path: str, max_context_length: int | None) -> ModelCard:
    card = replace(models.resolve(path or name), name=name)
    if not max_context_length:
        return card
    trained = models.context_trained(path or name)
    if max_context_length > trained:
        log.warning(
            "max_model_len: %d tokens of %s are more than the %d that its config.json names (max_position_embeddings): "
            "beyond those it was not trained",
            max_context_length, name, trained,
        )  # fmt: skip
    return replace(card, max_context_length=max_context_length)
