"""Data parallel: how the datums of a batch are divided (what several processes make of them: contract/test_ranks)."""

from __future__ import annotations

from tests.support.datums import ask, make_datum
from tuft_jupyter.engine.parallel import share


def test_every_datum_is_run_once_and_no_rank_is_idle() -> None:
    batch = [("a", ask([make_datum(n) for n in (40, 9, 9, 1)])), ("b", ask([make_datum(21)]))]
    shares = share(batch, 2)
    for item, (_, request) in enumerate(batch):
        assert sorted(j for mine in shares for j in mine[item]) == list(range(len(request.data)))
    tokens = [
        sum(
            len(request.data[j].tokens)
            for (_, request), mine in zip(batch, chosen, strict=True)
            for j in mine
        )
        for chosen in shares
    ]
    assert tokens == [40, 40]
