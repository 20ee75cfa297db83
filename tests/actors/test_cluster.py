"""Entering a cluster: what must hold before Ray has started."""

from __future__ import annotations

import socket

from actors.cluster import _reserve_port


def test_a_port_is_given_once_and_only_if_nothing_listens_on_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        first = listening.getsockname()[1]
        with _reserve_port(first) as one, _reserve_port(first) as other:
            assert first < one < other
        with _reserve_port(first) as again:
            assert again == one
