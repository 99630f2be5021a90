import functools
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from raysweep.cluster.address import _token, check_address, joins_cluster
from raysweep.cluster.session import ray_session
from raysweep.errors import ResourceError


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_does_not_answer_is_named_at_once(form, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        address = form.format(taken.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ResourceError, match=f"RAY_ADDRESS: no Ray cluster answers at '{address}'"):
            ray_session(verbose=False).__enter__()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\0" * 64])
def test_something_else_than_ray_is_named(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    client, _ = server.accept()
                except OSError:  # the test is over
                    return
                client.sendall(answer)
                client.close()

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ResourceError, match=f"RAY_ADDRESS: what answers at '{address}' is not Ray"):
            check_address(address)
        server.shutdown(socket.SHUT_RDWR)


def test_something_that_never_answers_is_named(monkeypatch):
    monkeypatch.setattr("raysweep.cluster.address.SECONDS_TO_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ResourceError, match="is not Ray"):
        check_address(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.fixture
def guarded():
    """The address of a GCS that wants the token "right"."""
    from ray.core.generated import gcs_service_pb2_grpc as services
    from ray.core.generated.gcs_service_pb2 import GetClusterIdReply

    class Guarded(services.NodeInfoGcsServiceServicer):
        def GetClusterId(self, request, context):
            if ("authorization", "Bearer right") not in [tuple(one) for one in context.invocation_metadata()]:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return GetClusterIdReply()

    server = grpc.server(ThreadPoolExecutor(1))
    services.add_NodeInfoGcsServiceServicer_to_server(Guarded(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(
    ("token", "said"), [("", "and none is set"), ("wrong", "and does not take the one"), ("right", "")]
)
def test_a_cluster_that_wants_another_token_is_named_at_once(guarded, monkeypatch, token, said):
    sent = (("authorization", f"Bearer {token}"),) if token else ()
    monkeypatch.setattr("raysweep.cluster.address._token", lambda: sent)
    if said:
        with pytest.raises(ResourceError, match=f"RAY_ADDRESS: .*{guarded}' wants a token, {said}.*; set RAY_AUTH"):
            check_address(guarded)
    else:
        check_address(guarded)


def test_no_token_is_sent_where_ray_sends_none():
    assert _token() == ()


@pytest.mark.parametrize(
    "address",
    ["garbage", "head", ":6379", "head:", "head:port", "head:0", "head:65536", "ray://head", "redis://head:1"],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ResourceError, match=f"RAY_ADDRESS: '{address}' is not the address of a Ray cluster; accepted:"):
        check_address(address)


def test_the_address_of_a_dashboard_leads_to_submit():
    with pytest.raises(ResourceError, match="raysweep submit --address"):
        check_address("http://127.0.0.1:8265")


def test_a_word_without_a_cluster_is_refused(monkeypatch):
    """The environment of the tests has no cluster that Ray would find."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(set))
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda temp_dir: None)
    with pytest.raises(ResourceError, match=r"'auto' cannot be joined \(Could not find any"):
        ray_session(verbose=False).__enter__()


def test_a_cluster_that_is_found_and_does_not_answer_is_named_at_once(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        address = f"127.0.0.1:{port}"
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(lambda: {address}))
        monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda temp_dir: None)
        with pytest.raises(ResourceError, match=f"RAY_ADDRESS: no Ray cluster answers at '[0-9.]+:{port}'"):
            ray_session(verbose=False).__enter__()


@pytest.mark.parametrize(("address", "joins"), [("", False), ("local", False), ("auto", True), ("head:6379", True)])
def test_which_addresses_join_a_cluster(address, joins, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert joins_cluster() is joins
