"""Whether what a trial asks for fits a cluster's nodes: by hand, and against all assignments."""

import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_hypergrad.comparison.placement import can_be_placed

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
    assert not can_be_placed([{"CPU": 40}] * 501, strategy, nodes)
    assert time.perf_counter() - begun < 10
