"""Waits for the nodes of a cluster, and checks which files they can read."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping

from raysweep.cluster.address import joins_cluster
from raysweep.cluster.resources import Resources, check_resources, uses_gpu
from raysweep.cluster.session import SECONDS_BETWEEN_LOOKS, RaySession
from raysweep.errors import ResourceError
from raysweep.experiment.config import ResourcesConfig
from raysweep.storage.filesystems import open_filesystem


def wait_for_nodes(config: ResourcesConfig, session: RaySession, say: Callable[[str], None]) -> Resources:
    """Asks the autoscaler for the resources that one training run lacks, and waits until the cluster has them.

    Args:
        config: The resources of one training run, and how long to wait.
        session: The Ray session.
        say: Called with a message if it has to wait.

    Returns:
        The resources of the cluster.

    Raises:
        ResourceError: One training run still needs more than the cluster has.
    """
    present, deadline, is_waiting = session.resources, time.monotonic() + config.wait_for_nodes_s, False
    while True:
        try:
            check_resources(config, present)
        except ResourceError as error:
            if not joins_cluster() or time.monotonic() > deadline:
                raise
            if not is_waiting:
                say(f"waiting for nodes, at most {config.wait_for_nodes_s:g} s: {error}")
                _request_nodes(config, uses_gpu(config, present))
            is_waiting = True
        else:
            if is_waiting:
                _request_nodes(None)
            return present
        time.sleep(SECONDS_BETWEEN_LOOKS)
        present = session.resources_now


def _request_nodes(config: ResourcesConfig | None, on_gpus: bool = False) -> None:
    """Requests the resources of one training run from the autoscaler. None withdraws the request."""
    from ray.autoscaler.sdk import request_resources

    if config is None:
        request_resources(bundles=[])
        return
    gpus = {"GPU": math.ceil(config.gpus_per_worker)} if on_gpus else {}
    request_resources(bundles=[{"CPU": config.cpus_per_worker, **gpus}] * config.num_workers)


def check_nodes(places: Mapping[str, str]) -> None:
    """Checks that every node can read the files, so that a sweep does not fail on one node after hours.

    Args:
        places: Paths or URIs, by the name that an error message gives them.

    Raises:
        ResourceError: A node cannot read one of them.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    task = ray.remote(num_cpus=0)(_missing_places)
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    missing = ray.get([task.options(scheduling_strategy=strategy).remote(dict(places)) for strategy in strategies])
    for name in places:
        lacking = sorted(
            node["NodeManagerAddress"] for node, names in zip(nodes, missing, strict=True) if name in names
        )
        if lacking:
            raise ResourceError(
                f"{name} is not seen by {len(lacking)} of {len(nodes)} nodes ({', '.join(lacking[:5])}); accepted on "
                "several nodes: a folder that all of them share, at the same path, or a bucket: s3://..., gs://..."
            )


def _missing_places(places: dict[str, str]) -> list[str]:
    """Returns the names of the places that this node cannot read."""
    return [name for name, place in places.items() if not is_visible(place)]


def is_visible(place: str) -> bool:
    """Returns whether this machine can read a file or folder, given by path or URI."""
    if "://" not in place:
        return os.path.exists(place)
    filesystem, inner = open_filesystem(place)
    try:
        return bool(filesystem.get_file_info(inner).type.value)
    except OSError:  # no permission, or no such bucket
        return False
