"""The nodes of a cluster: waiting for them, and what they can see."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping

from raysweep.cluster.resources import Resources, check_resources, uses_gpu
from raysweep.cluster.session import SECONDS_BETWEEN_LOOKS, RaySession, joins_cluster
from raysweep.errors import ResourceError
from raysweep.experiment.config import ResourcesConfig
from raysweep.storage.filesystems import open_filesystem


def wait_for_nodes(config: ResourcesConfig, session: RaySession, say: Callable[[str], None]) -> Resources:
    """Has the cluster's autoscaler bring what one training run lacks, and waits until it is there.

    Args:
        config: what one training run takes, and how long to wait.
        session: Ray.
        say: told that there is something to wait for.

    Raises:
        ResourceError: one training run needs more than there is in the end.
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
    """Tells the autoscaler what one training run needs; None: no more than what runs holds by itself."""
    from ray.autoscaler.sdk import request_resources

    if config is None:
        request_resources(bundles=[])
        return
    gpus = {"GPU": math.ceil(config.gpus_per_worker)} if on_gpus else {}
    request_resources(bundles=[{"CPU": config.cpus_per_worker, **gpus}] * config.num_workers)


def check_nodes(places: Mapping[str, str]) -> None:
    """Refuses files that some node of the cluster cannot see, before hours of work end on that node.

    Args:
        places: paths or URIs, each with what a user calls it.

    Raises:
        ResourceError: a node does not see one of them.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    look = ray.remote(num_cpus=0)(_unseen)
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    unseen = ray.get([look.options(scheduling_strategy=strategy).remote(dict(places)) for strategy in there])
    for name in places:
        blind = sorted(node["NodeManagerAddress"] for node, keys in zip(nodes, unseen, strict=True) if name in keys)
        if blind:
            raise ResourceError(
                f"{name} is not seen by {len(blind)} of {len(nodes)} nodes ({', '.join(blind[:5])}); accepted on "
                "several nodes: a folder that all of them share, at the same path, or a bucket: s3://..., gs://..."
            )


def _unseen(places: dict[str, str]) -> list[str]:
    """The names of places that this node does not see."""
    return [name for name, place in places.items() if not is_visible(place)]


def is_visible(place: str) -> bool:
    """Whether this machine can see a file or folder, by path or URI."""
    if "://" not in place:
        return os.path.exists(place)
    filesystem, inner = open_filesystem(place)
    try:
        return bool(filesystem.get_file_info(inner).type.value)
    except OSError:  # no rights, or no such bucket
        return False
