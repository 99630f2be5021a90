"""Waiting for nodes, and what they see, with stand-ins for Ray; real nodes are in test_real_nodes.py."""

from types import SimpleNamespace

import pytest

from raysweep.cluster import nodes
from raysweep.cluster.nodes import check_nodes, is_visible, wait_for_nodes
from raysweep.cluster.resources import Resources
from raysweep.errors import ResourceError
from raysweep.experiment.sections import ResourcesConfig

ONE, TWO = Resources(1, 0, ((1, 0),)), Resources(2, 0, ((1, 0), (1, 0)))


@pytest.fixture
def waiting(monkeypatch):
    """A function that waits for two workers beside an autoscaler that brings `looks`; what it said and asked for."""
    found = SimpleNamespace(said=[], asked=[])
    monkeypatch.setattr(nodes, "SECONDS_BETWEEN_LOOKS", 0)

    def request_resources(bundles):
        found.asked.append(bundles)

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", request_resources)

    class Session:
        def __init__(self, first, looks):
            self.resources, self.looks = first, list(looks)

        @property
        def resources_now(self):
            return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def wait(first, *looks, **keys):
        return wait_for_nodes(ResourcesConfig(**{"num_workers": 2} | keys), Session(first, looks), found.said.append)

    found.wait = wait
    return found


def test_what_is_there_is_not_waited_for(waiting, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert waiting.wait(TWO, wait_for_nodes_s=60) == TWO
    assert (waiting.said, waiting.asked) == ([], [])


def test_nodes_are_asked_for_once_and_let_go_when_they_are_there(waiting, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert waiting.wait(ONE, ONE, ONE, TWO, wait_for_nodes_s=60) == TWO
    (said,) = waiting.said
    assert said.startswith("waiting for nodes, at most 60 s: resources: one training run needs 2 CPUs")
    assert waiting.asked == [[{"CPU": 1}] * 2, []]


def test_a_share_of_a_gpu_asks_for_a_whole_one(waiting, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    keys = {"num_workers": 1, "use_gpu": True, "gpus_per_worker": 0.5, "cpus_per_worker": 3}
    there = Resources(4, 1, ((4, 1),))
    assert waiting.wait(ONE, there, wait_for_nodes_s=60, **keys) == there
    assert waiting.asked == [[{"CPU": 3, "GPU": 1}], []]


@pytest.mark.parametrize("address", [None, "127.0.0.1:6379"], ids=["alone", "too late"])
def test_what_does_not_come_is_refused(waiting, monkeypatch, address):
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match="one training run needs 2 CPUs"):
        waiting.wait(ONE, ONE, wait_for_nodes_s=0.01 if address else 60)
    assert len(waiting.said) == (1 if address else 0)


# What nodes see


class Blind(dict):
    """Also keeps what each node was asked for."""

    def __init__(self, places):
        super().__init__(places)
        self.asked = {}


@pytest.fixture
def blind(monkeypatch):
    """Names of the places that each node cannot see, by the node's address; a node that is dead is not asked."""
    found = Blind({"10.0.0.1": [], "10.0.0.2": []})

    ids = {address.encode().hex().ljust(56, "0"): address for address in (*found, "10.0.0.3")}

    def all_nodes():
        return [
            {"Alive": address in found, "NodeID": node_id, "NodeManagerAddress": address}
            for node_id, address in ids.items()
        ]

    def look(function):
        def on(scheduling_strategy):
            def remote(places):
                address = ids[scheduling_strategy.node_id]
                found.asked[address] = places
                return found[address]

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=on)

    monkeypatch.setattr("ray.nodes", all_nodes)
    monkeypatch.setattr("ray.remote", lambda **options: look)
    monkeypatch.setattr("ray.get", lambda answers: answers)
    return found


PLACES = {"storage: 'runs'": "/here/runs", "data.source: 'images'": "/here/images"}


def test_what_all_nodes_see_is_accepted(blind):
    check_nodes(PLACES)
    assert blind.asked == {"10.0.0.1": PLACES, "10.0.0.2": PLACES}


def test_what_a_node_cannot_see_is_named_with_the_node(blind):
    blind["10.0.0.2"].append("data.source: 'images'")
    found = r"data.source: 'images' is not seen by 1 of 2 nodes \(10.0.0.2\); accepted on several nodes: a folder that"
    with pytest.raises(ResourceError, match=found):
        check_nodes(PLACES)


def test_one_node_sees_what_the_driver_sees(blind):
    del blind["10.0.0.1"]
    blind["10.0.0.2"].append("storage: 'runs'")
    check_nodes(PLACES)
    assert blind.asked == {}


def test_files_and_folders_of_this_machine_are_seen(tmp_path):
    (tmp_path / "file").write_text("")
    assert is_visible(str(tmp_path))
    assert is_visible(str(tmp_path / "file"))
    assert not is_visible(str(tmp_path / "other"))


def test_files_of_a_bucket_are_seen(bucket):
    import boto3

    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=name, Key=f"{prefix}/file", Body=b"")
    assert is_visible(f"{bucket}/file")
    assert not is_visible(f"{bucket}/other")
    assert not is_visible("s3://no-such-bucket/file")
