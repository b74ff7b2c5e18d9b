"""A Ray cluster of two nodes of one core each, on the loopback."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

NODE = {
    "num_cpus": 1,
    "object_store_memory": 80 * 2**20,  # near the least that Ray accepts: what actors take and return is small
    "node_ip_address": "127.0.0.2",  # Ray replaces 127.0.0.1 by an address of the network
}
HEAD = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}

SETTINGS = {
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_enable_metrics_collection": "0",
}
"""Ray makes actors 15 steps nicer than its other processes: on a machine with other work they need minutes to import torch. Processes of
Python that it starts in advance, and those that only watch, take the two cores while the nodes start, for which Ray allows 30 seconds."""


class TwoNodes:
    """The cluster; `second` can be lost, and comes back by `complete`."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=NODE | HEAD)
        self._second: Any = None
        self.address = self._cluster.address
        self.complete()

    def complete(self) -> None:
        """Start the second node, if it is gone."""
        if self._second is None:
            self._second = self._cluster.add_node(**NODE)

    def lose_second(self) -> None:
        """Kill the processes of the second node."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = None

    def shutdown(self) -> None:
        """End all processes."""
        self._cluster.shutdown()


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """The cluster, to which this process is connected."""
    ray: Any = pytest.importorskip("ray", reason="ray is not installed: pip install 'sepcap[ray]'")
    with mock.patch.dict(os.environ, SETTINGS):
        cluster = TwoNodes()
        try:
            ray.init(address=cluster.address, log_to_driver=False, _node_ip_address=NODE["node_ip_address"])
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def actors() -> list[int]:
    """Process ids of the actors of sepcap, on both nodes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if path.read_bytes().startswith(b"ray::Here"):
                found.append(int(path.parent.name))
    return found
