import os
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from raysweep.cluster import session as cluster
from raysweep.cluster.resources import Resources
from raysweep.cluster.session import RaySession, give_tune_no_variables
from raysweep.errors import ResourceError


def fail_loudly():
    with cluster._silent_stderr():
        os.write(2, b"the reason\n")
        raise ValueError("boom")


def test_what_is_held_back_is_shown_when_the_block_fails(capfd):
    with cluster._silent_stderr():
        os.write(2, b"noise\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match="boom"):
        fail_loudly()
    assert capfd.readouterr().err == "the reason\n"


# Ray in a thread of its own


@pytest.fixture
def sessions(monkeypatch):
    """Stands for Ray: what is entered and left, with the thread that did; waits for `may_start`."""
    found = SimpleNamespace(events=[], may_start=threading.Event(), error=None)

    @contextmanager
    def fake_session(verbose):
        found.may_start.wait(10)
        if found.error:
            raise found.error
        found.events.append(("started", threading.current_thread()))
        yield Resources(4, 1)
        found.events.append(("left", threading.current_thread()))

    monkeypatch.setattr(cluster, "ray_session", fake_session)
    return found


def test_ray_starts_while_other_things_are_done(sessions):
    told = []
    session = RaySession(False, told.append)
    session.start()
    assert (sessions.events, told) == ([], []), "nobody waits for it yet"
    sessions.may_start.set()
    assert session.resources == Resources(4, 1)
    assert told == [Resources(4, 1)]
    session.close()


def test_ray_is_started_once_and_left_by_the_thread_that_started_it(sessions):
    sessions.may_start.set()
    session = RaySession(False)
    session.start()
    session.start()
    assert session.resources is session.resources
    session.leave()
    session.close()
    assert [event for event, _ in sessions.events] == ["started", "left"]
    (thread,) = {thread for _, thread in sessions.events}
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_asking_for_resources_starts_ray(sessions):
    sessions.may_start.set()
    session = RaySession(False)
    assert session.resources == Resources(4, 1)
    session.close()
    assert [event for event, _ in sessions.events] == ["started", "left"]


def test_what_was_never_started_is_not_left(sessions):
    session = RaySession(False)
    session.leave()
    session.close()
    assert sessions.events == []


@pytest.mark.parametrize("address", ["", "head:6379"])
def test_a_signal_ends_a_sweep_while_ray_still_starts(sessions, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster, "is_stopping", lambda: True)
    session = RaySession(False)
    session.start()
    began = time.monotonic()
    session.close()
    assert time.monotonic() - began < 5
    sessions.may_start.set()
    assert session.resources == Resources(4, 1)
    session.close()
    left = [name for name, _ in sessions.events] == ["started", "left"]
    assert left is bool(address), "a cluster outlives this process"
    if not left:
        session.leave()


def test_a_cluster_that_is_not_there_shows_when_it_is_needed(sessions):
    sessions.may_start.set()
    sessions.error = ResourceError("RAY_ADDRESS: no Ray cluster answers")
    session = RaySession(False)
    session.start()
    with pytest.raises(ResourceError, match="no Ray cluster answers"):
        _ = session.resources
    session.close()


@pytest.fixture
def class_cache(monkeypatch):
    """The tables of Ray that are emptied, filled as Ray fills them."""
    from ray.tune.execution import class_cache

    for name, content in (("DEFAULT_ENV_VARS", {"PL_DISABLE_FORK": "1"}), ("ENV_VARS_TO_PROPAGATE", {"RAY_X"})):
        assert isinstance(getattr(class_cache, name), type(content))
        monkeypatch.setattr(class_cache, name, content)
    return class_cache


def environment_of_an_actor(class_cache):
    actor = class_cache._ActorClassCache().get(type("Trainable", (), {}))
    return (actor._default_options.get("runtime_env") or {}).get("env_vars", {})


def test_tune_gives_its_actors_no_environment_of_their_own(class_cache, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_X", "1")
    assert environment_of_an_actor(class_cache) == {"PL_DISABLE_FORK": "1", "RAY_X": "1"}
    give_tune_no_variables()
    assert environment_of_an_actor(class_cache) == {}


@pytest.mark.parametrize("address", ["", "127.0.0.1:6379"], ids=["own Ray", "cluster"])
def test_tune_copies_no_secret_into_the_environment_of_its_actors(address, monkeypatch):
    """With the lists of the installed Ray. It writes what stands there to its logs, and shows it in its state API."""
    from ray.tune.execution import class_cache

    for name in ("DEFAULT_ENV_VARS", "ENV_VARS_TO_PROPAGATE"):
        monkeypatch.setattr(class_cache, name, getattr(class_cache, name).copy())
    assert "AWS_SECRET_ACCESS_KEY" in class_cache.ENV_VARS_TO_PROPAGATE
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    give_tune_no_variables()
    assert environment_of_an_actor(class_cache) == {}


def test_settings_of_other_programs_do_not_change_what_our_code_relies_on(monkeypatch):
    for name in cluster.NEEDED_SETTINGS:
        monkeypatch.setenv(name, "other")
    kept = {"RAY_worker_niceness": "7"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    cluster._set_environment(verbose=False)
    assert {name: os.environ[name] for name in cluster.NEEDED_SETTINGS} == cluster.NEEDED_SETTINGS
    assert {name: os.environ[name] for name in kept} == kept


LEAVE = """
    import gc, sys, threading, time
    import ray
    from raysweep.cluster.session import RaySession, _holds_ray

    session = RaySession(verbose=False)
    session.resources
    assert _holds_ray()
    kept, thrown_away = ([ray.put(number) for number in range(2000)] for _ in range(2))

    def litter():
        while thrown_away:
            cycle = [thrown_away.pop()]
            cycle.append(cycle)
            time.sleep(0.0005)

    gc.set_threshold(1, 1, 1)
    threading.Thread(target=litter).start()
    session.leave()
    assert not _holds_ray()
    while kept:
        kept.pop()
        time.sleep(0.0005)
    session.close()
    assert gc.isenabled()
    sys.exit(7)
"""


@pytest.mark.ray
def test_references_may_be_dropped_once_ray_is_left(monkeypatch):
    """Ray ends a process that drops one while it shuts down, with status 1 and without a word."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LEAVE)], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
