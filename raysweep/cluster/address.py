"""The cluster that RAY_ADDRESS names, and how a sweep joins it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from raysweep.errors import ResourceError, one_line

WORDS = ("auto", "local")  # of Ray: a cluster that runs on this machine; none
SECONDS_TO_ANSWER = 10
TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to it or RAY_AUTH_TOKEN_PATH to a file that holds it"
ACCEPTED = "accepted: HOST:PORT of a head node, auto, or no RAY_ADDRESS for a Ray of this sweep"


def joins_cluster() -> bool:
    """Returns whether the sweep joins an existing cluster, instead of starting Ray itself."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


@contextmanager
def joined_cluster(options: Mapping[str, Any]) -> Iterator[None]:
    """Joins the cluster of RAY_ADDRESS.

    Args:
        options: options of `ray.init`.

    Raises:
        ResourceError: RAY_ADDRESS is no address, no Ray cluster answers there, or it does not let this process in.
    """
    import ray

    address = os.environ["RAY_ADDRESS"]
    try:
        check_address(_find_cluster() if address == "auto" else address)
        ray.init(**options)
    except ResourceError:
        raise
    except Exception as error:
        reason = one_line(error, 500)
        if "Version mismatch" in reason:
            reason += "; install the versions of the cluster here, or use raysweep submit"
        raise ResourceError(f"RAY_ADDRESS: the Ray cluster at '{address}' cannot be joined ({reason})") from error
    yield


def _find_cluster() -> str:
    """Returns the address that Ray finds for `auto`; the machine may have left it, and Ray would try for minutes."""
    from ray._private import services

    return str(services.canonicalize_bootstrap_address("auto") or "auto")


def check_address(address: str) -> None:
    """Checks that a Ray cluster answers. Ray itself would try for minutes, and then end the process.

    Args:
        address: `[ray://]host:port`, or a word that Ray understands.

    Raises:
        ResourceError: it is no address, nothing answers there, or something that is not Ray.
    """
    if address in WORDS:
        return
    scheme, separator, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    if separator and scheme != "ray":
        ways = "; a dashboard takes sweeps with raysweep submit --address" if scheme.startswith("http") else ""
        raise ResourceError(f"RAY_ADDRESS: '{address}' is not the address of a Ray cluster; {ACCEPTED}{ways}")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ResourceError(f"RAY_ADDRESS: '{address}' is not the address of a Ray cluster; {ACCEPTED}")
    host = host.strip("[]")
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise ResourceError(f"RAY_ADDRESS: no Ray cluster answers at '{address}' ({error}); {ACCEPTED}") from error
    if not separator:
        _check_is_ray(address)


def _check_is_ray(address: str) -> None:
    """Asks for the id of the cluster with the token that Ray would send: with a wrong one, it tries for minutes."""
    import grpc  # type: ignore[import-untyped]
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(
                GetClusterIdRequest(), timeout=SECONDS_TO_ANSWER, metadata=_token()
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                known = "and does not take the one that is set" if _token() else "and none is set"
                raise ResourceError(
                    f"RAY_ADDRESS: the Ray cluster at '{address}' wants a token, {known}; {TOKEN}"
                ) from error
            found = f"{error.code().name.lower()}: {error.details()}"[:200]
            raise ResourceError(f"RAY_ADDRESS: what answers at '{address}' is not Ray ({found}); {ACCEPTED}") from error


def _token() -> tuple[tuple[str, str], ...]:
    """Returns the token that Ray sends, as metadata of a call; empty if it sends none."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.authentication.grpc_authentication_client_interceptor import _get_authentication_metadata_tuple

    return tuple(_get_authentication_metadata_tuple()) if is_token_auth_enabled() else ()
