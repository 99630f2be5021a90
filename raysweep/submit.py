"""`python -m raysweep.submit EXPERIMENT.yaml --address http://HEAD:8265`: runs a sweep on a cluster with Ray Jobs."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from raysweep.cluster.signals import stop_signals
from raysweep.errors import ConfigError, RaysweepError, ResourceError, has_secrets, hide_secrets

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
SECONDS_BETWEEN_LOOKS = 2.0
CHECKS_BEFORE_MESSAGE = 3  # of a job that is still pending
SECONDS_TO_STOP = 60
SECONDS_TO_ANSWER = 60
QUIET_LOGGERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
LOST_CONNECTIONS = 30  # in a row, before this command gives up; the job itself continues
SECONDS_OF_SILENCE = 30  # before the log is requested again: a connection can break without an error
MESSAGE_LENGTH = 2000  # characters from the end, where Ray lists packages that cannot be installed


class OutputClosedError(Exception):
    """The program that reads our output has ended, for example `head`."""


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of `raysweep submit`."""
    parser = argparse.ArgumentParser(
        prog="raysweep submit",
        description="Runs a sweep on a Ray cluster, and shows what it says. Ctrl-C leaves it running.",
        epilog="Where the cluster wants a token: RAY_AUTH_TOKEN, a file that RAY_AUTH_TOKEN_PATH names, or "
        "~/.ray/auth_token. It is sent as a header; use an SSH tunnel or https:// to a head that is not this machine.",
    )
    parser.add_argument("experiment", nargs="?", type=Path, metavar="EXPERIMENT.yaml")
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS), metavar="URL",
                        help=f"the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, or {ADDRESS})")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a key of the file")  # fmt: skip
    parser.add_argument("--no-pip", action="store_true",
                        help="install nothing, the nodes have it all (default: what constraints.txt pins)")  # fmt: skip
    parser.add_argument("--upload-data", action="store_true",
                        help="send local images and weights along (into the storage, if it is a bucket)")  # fmt: skip
    parser.add_argument("--include", action="append", default=[], metavar="PATH",
                        help="pack what would be left out: hidden, in .gitignore, or a key file")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="print what the cluster has, the plan, and how long it will take there")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages too, and tracebacks")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--detach", action="store_true", help="do not wait for the job")
    action.add_argument("--follow", metavar="JOB", help="show a job from its beginning, and wait for it")
    action.add_argument("--stop", metavar="JOB", help="stop a job; submitted again, its sweep goes on")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The job's exit status; 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM, 141 if the output is
        closed.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not (options.experiment or options.follow or options.stop):
        parser.error("an experiment file is needed, e.g. experiments/quickstart.yaml; or --follow JOB, or --stop JOB")
    with stop_signals("leaving") as signals:
        status = _run(options)
        return signals.exit_status if signals.number else status


def _run(options: argparse.Namespace) -> int:
    """Submits, follows or stops a job; returns the exit status."""
    try:
        if options.stop:
            return _stop(options.address, options.stop)
        job = options.follow or _submit(options)
        if not options.detach:
            return _follow_until_interrupted(options.address, job)
        print(_follow_and_stop_commands(job, options.address))
        return 0
    except RaysweepError as error:
        if options.verbose:
            raise
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt as interrupt:
        _say(f"\ninterrupted; {interrupt if interrupt.args else 'nothing was submitted'}")
        return 130


def _follow_until_interrupted(address: str, job: str) -> int:
    """Follows a job until it ends, the user presses Ctrl-C, or the output is closed."""
    try:
        return _follow(address, job)
    except KeyboardInterrupt:
        status = 130
    except OutputClosedError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports an error at exit
        status = 141
    with suppress(BrokenPipeError):
        _say(f"\nthe job goes on\n{_follow_and_stop_commands(job, address)}")
    return status


def _submit(options: argparse.Namespace) -> str:
    """Checks and packs the experiment, and submits it to the cluster. Returns the job's name."""
    from raysweep.cluster.package import build_package, requirements
    from raysweep.experiment.config import load_experiment

    experiment = load_experiment(options.experiment, options.overrides)
    _check_settings(options.overrides)
    with _clear_errors(options.address):
        client = connect(options.address)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.zip"
        inside, uploaded = build_package(
            package, options.experiment, experiment,
            upload_data=options.upload_data, include=options.include, say=_say,
        )  # fmt: skip
        runtime_env: dict[str, object] = {"working_dir": str(package)}
        if not options.no_pip:
            runtime_env["pip"] = requirements(Path("constraints.txt"))
        size = package.stat().st_size
        job = f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        try:
            with _clear_errors(options.address):
                client.submit_job(
                    entrypoint=_entrypoint(options, inside, uploaded),
                    runtime_env=runtime_env,
                    submission_id=job,
                    metadata={"raysweep": experiment.name},
                )
        except KeyboardInterrupt:
            ways = _follow_and_stop_commands(job, options.address)
            raise KeyboardInterrupt(f"{job} may have been submitted\n{ways}") from None
    versions = "with the nodes' own packages" if options.no_pip else "and the pinned packages"
    _say(f"submitted {job}: the working directory ({size / 1e6:.1f} MB) {versions}")
    return job


def _say(text: str) -> None:
    print(hide_secrets(text), file=sys.stderr, flush=True)  # pip's messages repeat the URL of a private index


def _entrypoint(options: argparse.Namespace, inside: str, uploaded: Sequence[str]) -> str:
    settings = [word for setting in [*options.overrides, *uploaded] for word in ("--set", setting)]
    flags = [f"--{name.replace('_', '-')}" for name in ("dry_run", "verbose") if getattr(options, name)]
    return shlex.join(["python", "-m", "raysweep.run", inside, *settings, *flags])


def _follow_and_stop_commands(job: str, address: str) -> str:
    command = f"raysweep submit --address {shlex.quote(address)}"
    return f"follow it   {command} --follow {shlex.quote(job)}\nstop it     {command} --stop {shlex.quote(job)}"


def connect(address: str) -> JobSubmissionClient:
    """Connects to a cluster's job server. The token is sent as a header.

    Raises:
        ConfigError: The address is not the URL of a dashboard.
    """
    _check_address(address)
    from ray.job_submission import JobSubmissionClient

    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers the variable to the argument
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    token, _ = read_token()

    class TimeLimitedClient(JobSubmissionClient):  # type: ignore[misc]  # mypy skips the ray package
        """Sets a timeout for each request: a broken SSH tunnel accepts requests and never answers."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, timeout=SECONDS_TO_ANSWER, **options)

    return TimeLimitedClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)


def _check_address(address: str) -> None:
    accepted = "accepted: http://HEAD:8265"
    try:
        parts = urlsplit(address)
        is_dashboard = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # half of an IPv6 address, or a port that is no number
        is_dashboard = False
    if not is_dashboard:
        raise ConfigError(f"--address: '{address}' is not the URL of a dashboard; {accepted}")
    if parts.username is not None or parts.query:  # it would be printed, and logged on its way
        raise ConfigError(f"--address: the URL holds a user or a query; {accepted}, with the token in RAY_AUTH_TOKEN")


def _check_settings(settings: Sequence[str]) -> None:
    """Checks that `--set` holds no credentials: Ray shows the command of a job to everybody who sees its dashboard."""
    if found := next((setting.partition("=")[0] for setting in settings if has_secrets(setting)), None):
        raise ConfigError(
            f"--set {found}: the value holds credentials, which the cluster would log; accepted: the URI without them, "
            "and the credentials in the environment of the nodes"
        )


def read_token() -> tuple[str, str]:
    """Returns the cluster's token and where it was found, or two empty strings.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    if not named and not path.is_file():
        return "", ""
    try:
        return path.read_text().strip(), str(path)
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read ({error.strerror})") from error


@contextmanager
def _clear_errors(address: str) -> Iterator[None]:
    """Turns the exceptions of Ray's client into a clear error.

    Raises:
        ResourceError: No cluster answers, it needs another token, or it refuses the request.
    """
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        _, origin = read_token()
        known = f"another one than that of {origin}" if origin else "and there is none here"
        raise ResourceError(
            f"--address: the cluster at {address} wants a token, {known}; set RAY_AUTH_TOKEN to it, or "
            "RAY_AUTH_TOKEN_PATH to a file that holds it"
        ) from error
    except RaysweepError:
        raise
    except OSError as error:  # errors of the requests library, and Ray's ConnectionError
        raise ResourceError(f"--address: no Ray dashboard answers at {address} ({_shortened(error)})") from error
    except (RuntimeError, ValueError) as error:  # the job server refused the request
        raise ResourceError(f"--address: the cluster at {address} refused: {_shortened(error)}") from error


def _shortened(message: object) -> str:
    return " ".join(str(message).split())[:300]


def _follow(address: str, job: str) -> int:
    """Prints a job's log until the job ends. Returns its exit status."""
    import aiohttp

    with _clear_errors(address):
        client = connect(address)
        log, num_lost, num_checks, pending_reason = Log(client, job), 0, 0, ""
        info = client.get_job_info(job)  # raises at once if the job does not exist
        while True:
            try:
                if info.status != "PENDING":
                    asyncio.run(log.print_new())
                elif (num_checks := num_checks + 1) > CHECKS_BEFORE_MESSAGE and pending_reason != info.message:
                    pending_reason = info.message  # for example that packages are being installed
                    _say(f"{job} waits: {_shortened(pending_reason)}")
                if info.status.is_terminal():  # checked after its log was printed
                    break
                info, num_lost = client.get_job_info(job), 0
            except (aiohttp.ClientError, OSError, RuntimeError) as error:
                # A laptop sleeps or an SSH tunnel breaks. The job continues, and the cluster keeps its whole log.
                num_lost += 1
                if num_lost > LOST_CONNECTIONS:
                    raise ResourceError(
                        f"--address: the connection to {address} is lost ({_shortened(error)}); the job may go on\n"
                        f"{_follow_and_stop_commands(job, address)}"
                    ) from error
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:  # it never started or was stopped, and its log does not say why
        _say(f"{job} {info.status.lower()}: {str(info.message)[-MESSAGE_LENGTH:]}")
    return info.driver_exit_code or 1


class Log:
    """Prints each character of a job's log once, even if the connection breaks and is opened again."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self.client, self.job, self.printed = client, job, 0

    async def print_new(self) -> None:
        """Prints new text until the log ends, the connection breaks, or no text arrives for SECONDS_OF_SILENCE."""
        seen, loop = 0, asyncio.get_running_loop()
        with suppress(TimeoutError):
            async with asyncio.timeout(SECONDS_OF_SILENCE) as timeout:
                async for text in self.client.tail_job_logs(self.job):  # always starts at the beginning
                    timeout.reschedule(loop.time() + SECONDS_OF_SILENCE)
                    seen += len(text)
                    if seen > self.printed:
                        self._print(text[max(0, len(text) - (seen - self.printed)) :])
                        self.printed = seen

    @staticmethod
    def _print(text: str) -> None:
        try:
            print(text, end="", flush=True)
        except BrokenPipeError as error:
            raise OutputClosedError from error


def _stop(address: str, job: str) -> int:
    """Stops a job and waits until it has ended. Returns 0, or 1 if it had already ended."""
    with _clear_errors(address):
        client = connect(address)
        if not client.stop_job(job):
            _say(f"{job} had ended already: {client.get_job_info(job).status.lower()}")
            return 1
        deadline = time.monotonic() + SECONDS_TO_STOP
        while not client.get_job_info(job).status.is_terminal():
            if time.monotonic() > deadline:
                raise ResourceError(f"{job} has not ended within {SECONDS_TO_STOP} s; look at it with --follow {job}")
            time.sleep(0.2)
    _say(f"{job} stopped; what is finished is kept, and the same submission goes on from there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
