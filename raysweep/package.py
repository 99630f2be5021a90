"""What travels to a cluster with a submitted sweep: the working directory, the versions it needs, and local data."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

import raysweep
from raysweep.errors import ConfigError
from raysweep.experiment.config import Experiment
from raysweep.paths import signature
from raysweep.storage import is_bucket, upload

LIMIT = 500 * 2**20  # bytes; Ray keeps packages in its head's memory and takes 512 MiB
LEFT_OUT = [".git", ".venv", "venv", "__pycache__", "*.pyc"]
UPLOADED = "uploaded"  # folder of the package for what --upload-data adds
CLUSTERS_OWN = {"ray"}  # whose version must be that of the nodes


@dataclass(frozen=True)
class LocalPath:
    """A key of an experiment whose value is a file or folder of this machine; `path` is absolute."""

    key: str
    value: str
    path: Path


def local_paths(experiment: Experiment) -> list[LocalPath]:
    """The images and weights of an experiment, in as far as they lie on this machine or claim to.

    Raises:
        ConfigError: a relative path leads nowhere.
    """
    values = {"data.source": experiment.data.source}
    for number, encoder in enumerate(experiment.encoders):
        if encoder.use_pretrained and encoder.pretrained_model_name_or_path:
            values[f"encoders.{number}.pretrained_model_name_or_path"] = encoder.pretrained_model_name_or_path
    found = []
    for key, value in values.items():
        path = Path(value).expanduser()
        if "://" in value or not (path.exists() or key == "data.source"):  # else the name of weights on the hub
            continue
        if not path.exists() and not path.is_absolute():
            raise ConfigError(f"{key}: {path.absolute()}: no such file or folder")
        found.append(LocalPath(key, value, path.absolute()))
    return found


def build_package(
    target: Path, experiment_file: Path, experiment: Experiment, *, upload_data: bool
) -> tuple[str, list[str]]:
    """Packs the working directory, as its .gitignore says, with the experiment file and raysweep itself.

    Args:
        target: the zip file to be made.
        experiment_file: as it was named.
        experiment: what is in it.
        upload_data: whether local images and weights go along, images into the storage where that is a bucket.

    Returns:
        The experiment file's path within the package, and `KEY=VALUE` settings that lead to what was uploaded.

    Raises:
        ConfigError: the cluster would not see something that the experiment names, or the package is too large.
    """
    from ray._private.runtime_env.packaging import create_package

    create_package(os.getcwd(), target, include_gitignore=True, excludes=LEFT_OUT)
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as package:
        names = set(package.namelist())
        inside = _name_inside(experiment_file)
        if inside is None or inside not in names:
            inside = f"{UPLOADED}/{experiment_file.name}"
            package.write(experiment_file, inside)
        if "raysweep/__init__.py" not in names:
            _add(package, Path(raysweep.__file__).parent, "raysweep", {".py", ".typed"})
        settings = []
        for local in local_paths(experiment):
            if _is_packed(local, names):
                continue
            if not upload_data:
                _check_visible(local)
                continue
            if not local.path.exists():
                raise ConfigError(f"{local.key}: {local.path}: no such file or folder")
            settings.append(f"{local.key}={_send(local, experiment, package)}")
    if target.stat().st_size > LIMIT:
        size = f"{target.stat().st_size / 2**20:,.0f} MiB"
        raise ConfigError(
            f"the working directory makes a package of {size}, Ray takes {LIMIT / 2**20:,.0f}: leave data out of it "
            "with .gitignore, and keep it in a bucket (data.source: s3://..., or storage: s3://... and --upload-data)"
        )
    return inside, settings


def _name_inside(path: Path) -> str | None:
    """A path relative to the working directory, None outside of it."""
    absolute, here = path.absolute(), Path.cwd()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else None


def _is_packed(local: LocalPath, names: Iterable[str]) -> bool:
    inside = _name_inside(local.path)
    if Path(local.value).is_absolute() or inside is None:
        return False
    return any(PurePosixPath(name).is_relative_to(inside) and not name.endswith("/") for name in names)


def _check_visible(local: LocalPath) -> None:
    """Lets an absolute path pass: it may be a folder that the nodes share, and the job says so if it is not."""
    if Path(local.value).expanduser().is_absolute():
        return
    raise ConfigError(
        f"{local.key}: '{local.value}' lies on this machine alone, and the nodes of the cluster cannot see it. Ways "
        "out: (1) --upload-data sends it along; (2) an absolute path of a folder that all nodes share, with "
        f"--set {local.key}=/...; (3) images in a bucket or on the hub: s3://, gs://, hf://datasets/..."
    )


def _send(local: LocalPath, experiment: Experiment, package: zipfile.ZipFile) -> str:
    """Sends a file or folder along, or to the bucket; returns where the job finds it."""
    # A table names its images relative to itself.
    is_table = local.path.is_file() and local.path.suffix != ".parquet"
    folder = local.path.parent if is_table else local.path
    rest = f"/{local.path.name}" if is_table else ""
    if local.key == "data.source" and is_bucket(experiment.storage):
        files = [folder] if folder.is_file() else [file for file in sorted(folder.rglob("*")) if file.is_file()]
        stats = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        uri = f"{experiment.storage}/.data/{folder.stem}-{signature(stats)}{folder.suffix if folder.is_file() else ''}"
        upload(folder, uri)
        return uri + rest
    inside = f"{UPLOADED}/{local.key}/{folder.name}"
    if folder.is_file():
        package.write(folder, inside)
    else:
        _add(package, folder, inside)
    return inside + rest


def _add(package: zipfile.ZipFile, folder: Path, inside: str, suffixes: set[str] | None = None) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (suffixes is None or file.suffix in suffixes):
            package.write(file, f"{inside}/{file.relative_to(folder).as_posix()}")


def requirements(constraints: Path) -> list[str]:
    """What raysweep needs beside Ray, and what that needs in turn, each pinned: `name==version`, sorted.

    Args:
        constraints: file of `name==version` lines; what it lacks has the version that is installed here.
    """
    lines = constraints.read_text().splitlines() if constraints.exists() else []
    pins = {_normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    found: dict[str, str] = {}
    waiting: list[tuple[str, Sequence[str]]] = [("raysweep", ())]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        for needed, its_extras in _needs(name, extras):
            if (needed, its_extras) not in seen:
                seen.add((needed, its_extras))
                waiting.append((needed, its_extras))
                if needed not in CLUSTERS_OWN:
                    found[needed] = pins.get(needed) or distribution(needed).version
    return [f"{name}=={version.strip()}" for name, version in sorted(found.items())]


def _needs(name: str, extras: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Installed distributions that one needs, with the extras that it needs of them."""
    from packaging.requirements import Requirement

    needs = []
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            needed = _normal(requirement.name)
            try:
                distribution(needed)
            except PackageNotFoundError:  # of another platform
                continue
            needs.append((needed, tuple(sorted(requirement.extras))))
    return needs


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
