"""The environment of a sweep: versions of packages, and the git commit of the working directory."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

ROOT_TAG = "raysweep.root"  # location of a sweep's results
PACKAGES = ("raysweep", "ray", "torch", "transformers", "mlflow", "optuna")


def environment_tags(root: str) -> dict[str, str]:
    """Returns tags: location of the results, versions of packages, and git commit of the working directory."""
    tags = {ROOT_TAG: root, **{f"version.{name}": package_version(name) for name in PACKAGES}}
    tags["version.python"] = platform.python_version()
    commit = _git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _git_commit() -> str:
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or no commit in it
        return ""


def package_version(name: str) -> str:
    """Returns the version of a package, or `unknown` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
