"""Counters count, by labels, and never grow without bound."""

from __future__ import annotations

from tuft_jupyter.core.counters import SERIES, Counters, Series


def test_each_name_and_label_is_a_number_of_its_own() -> None:
    counters = Counters()
    counters.add("requests", route="a", status="200")
    counters.add("requests", status="200", route="a")
    counters.add("requests", route="b", status="200")
    counters.add("tokens", 40)
    assert counters.series() == [
        Series("requests", (("route", "a"), ("status", "200")), 2),
        Series("requests", (("route", "b"), ("status", "200")), 1),
        Series("tokens", (), 40),
    ]


def test_labels_without_end_take_no_memory_without_end() -> None:
    """L7: what cannot get a series of its own is still counted."""
    counters = Counters()
    for i in range(SERIES + 500):
        counters.add("n", label=str(i))
    series = counters.series()
    assert len(series) == SERIES + 1
    assert sum(one.value for one in series) == SERIES + 500
