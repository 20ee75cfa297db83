"""Entering a cluster: what must hold before Ray has started."""

from __future__ import annotations

import socket

import pytest

from actors import cluster
from actors.cluster import ActorGroup, Cluster, Placement, _reserve_port, place_in_turns, tell_what_lacks


def test_a_port_is_given_once_and_only_if_nothing_listens_on_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        first = listening.getsockname()[1]
        with _reserve_port(first) as one, _reserve_port(first) as other:
            assert first < one < other
        with _reserve_port(first) as again:
            assert again == one


CPU4 = {"CPU": 4.0, "memory": 1e9}
GPU1 = {"CPU": 8.0, "GPU": 1.0}


def test_an_actor_takes_no_more_cores_than_a_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": CPU4}] * 4)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 16.0})
    learners, rollouts = ActorGroup(1, None, "cpu"), ActorGroup(3, None, "cpu")
    placed = place_in_turns(Cluster(is_own=False), [learners, rollouts], timeout_s=0)
    assert placed == [Placement(4.0, 0, 4), Placement(2.0, 0, 4)]


@pytest.mark.parametrize(
    ("bundles", "nodes", "told"),
    [
        ([{"CPU": 2}] * 4, [CPU4, CPU4], ""),
        ([{"CPU": 2}] * 5, [CPU4, CPU4], "10 CPU (there are 8)"),
        ([{"CPU": 8}], [CPU4, CPU4], "1 x 8 CPU, each on one node (the largest nodes have 4 CPU)"),
        (
            [{"CPU": 3}] * 2,
            [{"CPU": 5.0}, {"CPU": 2.0}],
            "1 x 3 CPU, each on one node (the largest nodes have 5 CPU)",
        ),
        ([{"CPU": 4}, {"CPU": 4, "GPU": 1}, {"CPU": 4}], [GPU1, CPU4], ""),
        ([{"CPU": 1, "GPU": 0.6}] * 2, [GPU1, GPU1], ""),
        ([{"CPU": 1, "GPU": 0.6}] * 2 + [{"CPU": 1, "GPU": 0.4}] * 2, [GPU1, GPU1], ""),
        ([{"CPU": 1, "GPU": 1}], [CPU4], "1 GPU (there are 0)"),
        ([{"CPU": 1 / 3}] * 3, [{"CPU": 1.0}], ""),
        ([{"CPU": 1}], [], "1 CPU (there are 0)"),
    ],
)
def test_what_lacks_is_told_node_by_node(bundles, nodes, told: str) -> None:
    assert tell_what_lacks(bundles, nodes) == told
