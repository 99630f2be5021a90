"""What a sweep ran with: versions of packages, and the git commit of the working directory."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

ROOT_TAG = "raysweep.root"  # where a sweep keeps its results
PACKAGES = ("raysweep", "ray", "torch", "transformers", "mlflow", "optuna")


def environment_tags(root: str) -> dict[str, str]:
    """Returns tags: where a sweep keeps its results, versions of packages, and the working directory's git commit."""
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
    """Returns the version of an installed package, `unknown` where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
