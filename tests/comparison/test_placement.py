"""Whether what a trial asks for fits a cluster's nodes: by hand, and against all assignments."""

import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_hypergrad.comparison.running.placement import can_be_placed

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@pytest.mark.parametrize(
    ("bundles", "nodes", "fitting"),
    [
        ([{"CPU": 1}, {"CPU": 1}], [{"CPU": 2}], "PACK SPREAD STRICT_PACK"),
        ([{"CPU": 2}, {"CPU": 2}], [{"CPU": 2}], ""),
        ([{"CPU": 2}, {"CPU": 2}], [{"CPU": 2}, {"CPU": 3}], "PACK SPREAD STRICT_SPREAD"),
        ([{"CPU": 2}, {"CPU": 2}], [{"CPU": 4}, {"CPU": 1}], "PACK SPREAD STRICT_PACK"),
        ([{"CPU": 3}, {"CPU": 2}, {"CPU": 2}], [{"CPU": 4}, {"CPU": 4}], "PACK SPREAD"),
        ([{"CPU": 3}, {"CPU": 3}, {"CPU": 2}], [{"CPU": 4}, {"CPU": 4}], ""),  # enough in all, but nowhere
        ([{"CPU": 1}, {"GPU": 1}], [{"CPU": 1}, {"GPU": 1}], "PACK SPREAD STRICT_SPREAD"),
        ([{"CPU": 1, "GPU": 1}], [{"CPU": 8}, {"GPU": 1}], ""),
        ([{"licence": 1}], [{"CPU": 1}], ""),
        ([{"CPU": 0.1}] * 3, [{"CPU": 0.3}], "PACK SPREAD STRICT_PACK"),  # although 0.1 + 0.1 + 0.1 > 0.3
        ([{"CPU": 0.7}] * 2, [{"CPU": 2}], "PACK SPREAD STRICT_PACK"),
        ([{"CPU": 1}], [], ""),
        ([{"CPU": 0}, {"CPU": 1}], [{"CPU": 1}], "PACK SPREAD STRICT_PACK"),
    ],
)
def test_bundles_fit_together_or_not(bundles, nodes, fitting):
    assert [s for s in STRATEGIES if can_be_placed(bundles, s, nodes)] == fitting.split()


@pytest.mark.parametrize(
    ("bundles", "gpus", "fits"),
    [
        ([0.5, 0.5], 1, True),
        ([0.6, 0.6], 2, True),
        ([0.6, 0.6, 0.6], 2, False),  # each of them is a part of one GPU
        ([0.5, 1, 0.5], 2, True),
        ([0.75, 0.5, 0.25, 0.5], 2, True),
        ([0.6, 1, 0.6], 2, False),
        ([2], 2, True),
        ([1.5, 0.5], 2, True),
        ([1.5, 0.6], 2, False),
    ],
)
def test_parts_of_gpus_are_parts_of_one(bundles, gpus, fits):
    assert can_be_placed([{"GPU": amount} for amount in bundles], "PACK", [{"GPU": gpus, "CPU": 4}]) is fits


@given(
    st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 3), "memory": st.integers(0, 3)}), min_size=1, max_size=4),
    st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 5), "memory": st.integers(0, 5)}), max_size=3),
    st.sampled_from(STRATEGIES),
)
def test_it_agrees_with_looking_at_every_assignment(bundles, nodes, strategy):
    def fits(places):
        of_nodes = [[b for b, place in zip(bundles, places, strict=True) if place == i] for i in range(len(nodes))]
        return all(
            sum(bundle[name] for bundle in own) <= node[name]
            for own, node in zip(of_nodes, nodes, strict=True)
            for name in node
        )

    allowed = {
        "STRICT_PACK": lambda places: len(set(places)) == 1,
        "STRICT_SPREAD": lambda places: len(set(places)) == len(places),
    }.get(strategy, lambda places: True)
    expected = any(allowed(places) and fits(places) for places in product(range(len(nodes)), repeat=len(bundles)))
    assert can_be_placed(bundles, strategy, nodes) is expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_nodes_take_no_time(strategy):
    nodes = [{"CPU": 64, "GPU": 8, f"node:{i}": 1} for i in range(500)]
    begun = time.perf_counter()
    can_be_placed([{"CPU": 40, "GPU": 0.6}] * 40, strategy, nodes)
    assert not can_be_placed([{"CPU": 40}] * 151, strategy, nodes[:150])
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_that_would_take_long_is_taken_to_succeed(strategy):
    uneven = [{"CPU": 3 + i / 7, "memory": 5 - i / 11} for i in range(20)]
    begun = time.perf_counter()
    can_be_placed([{"CPU": 1.01 + i / 13, "memory": 2.4 - i / 17} for i in range(20)], strategy, uneven)
    assert time.perf_counter() - begun < 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_very_many_bundles_are_only_added_up(strategy):
    assert can_be_placed([{"CPU": 1}] * 5000, strategy, [{"CPU": 4000}, {"CPU": 1000}])
    assert not can_be_placed([{"CPU": 1}] * 5001, strategy, [{"CPU": 4000}, {"CPU": 1000}])


@given(
    st.lists(st.sampled_from([0.25, 0.4, 0.5, 0.6, 0.75, 1, 1.5, 2]), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), min_size=1, max_size=2),
)
def test_parts_of_gpus_agree_with_looking_at_every_assignment(amounts, gpus):
    def fit_one_node(own, count):
        parts = [amount % 1 for amount in own if amount % 1]
        pieces = count - sum(int(amount) for amount in own)  # what is left beside whole ones
        return pieces >= 0 and any(
            all(sum(p for p, place in zip(parts, places, strict=True) if place == i) <= 1 for i in range(pieces))
            for places in product(range(pieces), repeat=len(parts))
        )

    expected = any(
        all(
            fit_one_node([a for a, place in zip(amounts, places, strict=True) if place == i], count)
            for i, count in enumerate(gpus)
        )
        for places in product(range(len(gpus)), repeat=len(amounts))
    )
    nodes = [{"GPU": count, "CPU": 1} for count in gpus]
    assert can_be_placed([{"GPU": amount} for amount in amounts], "PACK", nodes) is expected
