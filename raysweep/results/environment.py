"""The environment of a sweep: versions of packages, and the git commit of the working directory."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raysweep.errors import ConfigError
from raysweep.storage.git import run_git

ROOT_TAG = "raysweep.root"  # location of a sweep's results
PACKAGES = ("raysweep", "ray", "torch", "transformers", "mlflow", "optuna")


def environment_tags(root: str) -> dict[str, str]:
    """Returns tags: location of the results, versions of packages, and git commit of the working directory."""
    tags = {ROOT_TAG: root, **{f"version.{name}": package_version(name) for name in PACKAGES}}
    tags["version.python"] = platform.python_version()
    commit = _git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _git_commit() -> str:
    try:
        found = run_git(Path.cwd(), "rev-parse", "--verify", "--quiet", "HEAD")
    except (OSError, ConfigError):  # no git, or it does not end
        return ""
    return "" if found.returncode else found.stdout.decode().strip()  # no repository, or no commit in it


def package_version(name: str) -> str:
    """Returns the version of a package, or `unknown` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
