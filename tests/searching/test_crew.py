"""Laws of where the members of a crew are placed; no cluster is needed for them."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given

from dsm_tune.searching.crew import roomiest

NODES = st.dictionaries(
    st.sampled_from("abcde"), st.tuples(st.integers(1, 64), st.integers(0, 4)), min_size=1
)


def place(nodes: dict[str, tuple[float, float]], workers: int, gpus: float) -> list[str]:
    """Where members come, one after the other."""
    homes: list[str] = []
    for _ in range(workers):
        homes.append(roomiest(nodes, homes, gpus, ""))
    return homes


@given(NODES, st.integers(1, 12), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]))
def test_members_that_were_placed_stay_while_no_node_comes_or_goes(
    nodes: dict[str, tuple[float, float]], workers: int, gpus: float
) -> None:
    homes = place(nodes, workers, gpus)
    for index, home in enumerate(homes):
        assert roomiest(nodes, homes[:index] + homes[index + 1 :], gpus, home) == home


@given(NODES, st.integers(1, 12), st.sampled_from([0.25, 1 / 3, 0.5, 1.0]))
def test_no_node_is_to_have_more_members_than_its_gpus_can_hold(
    nodes: dict[str, tuple[float, float]], workers: int, gpus: float
) -> None:
    for node, members in Counter(place(nodes, workers, gpus)).items():
        assert not node or members * gpus <= nodes[node][1] + 1e-6


def test_a_member_with_a_gpu_does_not_follow_cpus_to_a_node_whose_gpu_is_held() -> None:
    nodes = {"large": (16.0, 1.0), "small": (4.0, 1.0)}
    assert place(nodes, 2, 1.0) == ["large", "small"]
    assert roomiest(nodes, ["large"], 1.0, "small") == "small"


def test_a_member_comes_to_a_node_that_has_joined() -> None:
    nodes = {"left": (1.0, 0.0)}
    assert place(nodes, 2, 0.0) == ["left", "left"]
    assert roomiest({**nodes, "right": (1.0, 0.0)}, ["left"], 0.0, "left") == "right"
