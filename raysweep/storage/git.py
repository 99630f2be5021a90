"""Runs git so that neither a repository nor the environment can make it start another program."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from raysweep.errors import ConfigError

# A repository's own configuration may name programs (core.fsmonitor, hooks). A clone or an unpacked archive brings one.
SAFE = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
# Variables that say where the user's own configuration lies. All others (GIT_DIR, GIT_CONFIG_COUNT ...) are dropped.
KEPT = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM", "GIT_CEILING_DIRECTORIES")

SECONDS = 120  # git waits for ever for a pipe that is called .gitignore


def run_git(folder: Path, *arguments: str, index: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs git in a folder. Its status is returned, not checked.

    Args:
        folder: The working directory of the command.
        arguments: The command, after `git`.
        index: Another index file than that of the repository.

    Raises:
        OSError: git is not installed.
        ConfigError: git does not end.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in KEPT}
    # LC_ALL: messages are compared. No lazy fetch: a partial clone names the program that fetches.
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1"}
    if index is not None:
        environment["GIT_INDEX_FILE"] = str(index)
    command = ["git", *SAFE, *arguments]
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{folder}: git has not ended within {SECONDS} s; is a pipe there called .gitignore?"
        ) from error
