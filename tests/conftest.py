"""What every test finds: an environment that answers nothing, and that is as it was when the test has ended."""

import os
import signal

import pytest

from raysweep.experiment.config import ENVIRONMENT

# OpenMP's threads spin while they wait for one another: beside a second process of tests, sweeps would take three times
# as long. The library reads this when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True, scope="session")
def silent_environment():
    """Whatever a developer's shell says of storage, MLflow and clusters; and it may run the tests deaf to Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of what a script runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name in (*(name for name, _ in ENVIRONMENT.values()), "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def same_environment():
    """MLflow writes its URI into the environment, where the sweeps that later tests start would find it.

    Only what differs is put back: threads of Ray and of Arrow read the C library's environment at any time, and each
    write to it may take away the block that they read.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@pytest.fixture(scope="session")
def s3():
    """An S3 server of this process; its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def bucket(s3, monkeypatch, tmp_path, request):
    """The URI of a bucket of its own."""
    import boto3

    for name, value in {"AWS_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    name = f"bucket-{abs(hash(request.node.name)):x}"
    boto3.client("s3").create_bucket(Bucket=name)
    monkeypatch.setenv("RAYSWEEP_SCRATCH", str(tmp_path / "node-0"))
    return f"s3://{name}/some/prefix"
