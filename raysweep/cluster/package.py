"""Builds the package of a submitted sweep: the working directory, pinned requirements and local data."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import raysweep
from raysweep.cluster.contents import Contents, Files, choose_files
from raysweep.cluster.packing_rules import reason_in_named_folder
from raysweep.cluster.working_files import working_files
from raysweep.errors import ConfigError
from raysweep.experiment.config import DataConfig, Experiment
from raysweep.images.folder_files import local_files
from raysweep.images.listing import list_source
from raysweep.images.tables import TABLE_SUFFIXES
from raysweep.images.text_tables import decode_text
from raysweep.storage.copies import is_bucket, upload
from raysweep.storage.filesystems import absolute_source
from raysweep.storage.paths import signature

LIMIT = 100 * 2**20  # bytes: the largest request that Ray's dashboard accepts
UPLOADED = "uploaded"  # folder in the package for the files that --upload-data adds
PROVIDED_BY_NODES = {"ray"}  # the driver must use the version of the nodes
CHUNK = 2**20


@dataclass(frozen=True)
class LocalPath:
    """A key of an experiment whose value is a local file or folder. `path` is absolute."""

    key: str
    value: str
    path: Path

    @property
    def is_relative(self) -> bool:
        """Whether the value is a relative path, so that it is valid in the job's working directory too."""
        return "://" not in self.value and not Path(self.value).expanduser().is_absolute()

    @property
    def folder(self) -> Path:
        """The folder that file names are relative to. A table names its images relative to its own folder."""
        return self.path.parent if self.path.is_file() else self.path


def local_paths(experiment: Experiment) -> list[LocalPath]:
    """Returns the images and weights of an experiment that are local paths.

    Raises:
        ConfigError: A relative path does not exist.
    """
    values = {"data.source": experiment.data.source}
    for number, encoder in enumerate(experiment.encoders):
        if encoder.pretrained_model_name_or_path:
            values[f"encoders.{number}.pretrained_model_name_or_path"] = encoder.pretrained_model_name_or_path
    found = []
    for key, value in values.items():
        absolute = absolute_source(value)
        local = LocalPath(key, value, Path(absolute))
        # A value that is not an existing path names weights on the Hugging Face hub.
        if "://" in absolute or not (local.path.exists() or key == "data.source"):
            continue
        if not local.path.exists() and local.is_relative:
            raise ConfigError(f"{key}: {local.path}: no such file or folder")
        found.append(local)
    return found


def build_package(
    target: Path,
    experiment_file: Path,
    experiment: Experiment,
    *,
    upload_data: bool,
    include: Sequence[str] = (),
    say: Callable[[str], None] = lambda _text: None,
) -> tuple[str, list[str]]:
    """Packs the working directory, the experiment file and raysweep.

    Files that .gitignore names, hidden files, files that may hold keys, and links out of the folder stay out.

    Args:
        target: The zip file to write.
        experiment_file: Path of the experiment file, as the user gave it.
        experiment: Its content.
        upload_data: Whether local images and weights are sent too: to the storage if that is a bucket, else in the
            package.
        include: Files and folders of the working directory that are packed although a rule keeps them out.
        say: Called with a message before a long upload, and with what is packed and what stays out.

    Returns:
        The experiment file's path in the package, and `KEY=VALUE` settings that point to the uploaded files.

    Raises:
        ConfigError: The cluster could not read a path that the experiment names, or the package is too large.
        DataError: The images cannot be listed.
    """
    here = Path.cwd()
    results = _relative_name(Path(experiment.storage).expanduser()) or ".."
    listed, data_and_weights = working_files(here), local_paths(experiment)
    named = [name for local in data_and_weights if (name := _relative_name(local.path))]
    contents = choose_files(here, listed, results=results, named=named, include=include)
    files = contents.files
    inside = _relative_name(experiment_file)
    if inside not in files:
        inside = f"{UPLOADED}/{experiment_file.name}"
        files[inside] = experiment_file
    if "raysweep/__init__.py" not in files:
        folder = Path(raysweep.__file__).parent
        modules = [name for name in local_files(str(folder)) if name.endswith((".py", ".typed", ".jinja"))]
        files |= {f"raysweep/{name}": folder / name for name in modules}
    settings = []
    for local in data_and_weights:
        paths = _files_to_send(local, experiment.data, contents, upload_data)
        if paths is not None:
            place, added = _upload_or_pack(local, paths, experiment.storage, say)
            files |= added
            settings.append(f"{local.key}={json.dumps(place, ensure_ascii=False)}")
    say(contents.described())
    _write(target, files)
    return inside, settings


def _files_to_send(local: LocalPath, data: DataConfig, contents: Contents, upload_data: bool) -> list[Path] | None:
    """Returns the files of a local path that are sent beside the working directory; None if the nodes find them there.

    What rules keep out is added to what `contents` leaves out.

    Raises:
        ConfigError: The nodes could not read the path.
    """
    if not (local.is_relative or upload_data):  # it may be a shared folder
        return None
    if not local.path.exists():
        raise ConfigError(f"{local.key}: {local.path}: no such file or folder")
    paths, left_out = _files_of(local, data)
    contents.left_out.update({name: reason for name, reason in left_out.items() if name not in contents.files})
    paths += [Path.cwd() / name for name in left_out if name in contents.files]  # --include
    _check_tables(local, contents.left_out, left_out)
    if local.is_relative and all(_relative_name(path) in contents.files for path in paths):
        return None
    if not upload_data:
        raise ConfigError(_local_only_message(local))
    if local.key == "data.source" and Path(data.image_folder or "").expanduser().is_absolute():
        raise ConfigError(
            f"data.image_folder: {data.image_folder} lies on this machine alone; accepted with --upload-data: a folder "
            "below the table's, relative to it"
        )
    return paths


def _relative_name(path: Path) -> str | None:
    """Returns a path relative to the working directory, or None if it is outside."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else None


def _files_of(local: LocalPath, data: DataConfig) -> tuple[list[Path], dict[str, str]]:
    """Returns the files of a local path that may be sent, and reasons by name of those that may not.

    For `data.source` these are the images and tables that the sweep reads.
    """
    if local.key == "data.source":
        listing = list_source(data)
        read = {*listing.tables, *(row.path for row in listing.rows)}
        paths = {path for path in (local.path, *(Path(name) for name in read if "://" not in name)) if path.is_file()}
    else:
        paths = {local.folder / name for name in local_files(str(local.folder))}
    reasons = {path: reason_in_named_folder(path, local.folder) for path in paths if path != local.path}
    left_out = {os.path.relpath(path): reason for path, reason in reasons.items() if reason}
    return sorted(path for path in paths if not reasons.get(path)), left_out


def _check_tables(local: LocalPath, stays_out: Mapping[str, str], files: Iterable[str]) -> None:
    """Refuses to leave out a table of the images: without it, the job would take the labels from elsewhere."""
    tables = [name for name in files if local.key == "data.source" and name.lower().endswith(TABLE_SUFFIXES)]
    if lost := next((name for name in tables if name in stays_out), None):
        raise ConfigError(
            f"{local.key}: the sweep reads {lost}, which stays out of the package ({stays_out[lost]}); accepted: "
            "another name of the table or of its folder, or --include with a path in the working directory"
        )


def _local_only_message(local: LocalPath) -> str:
    other = "images in a bucket or on the hub: s3://, gs://, hf://datasets/..."
    if local.key != "data.source":
        other = "weights in a bucket or on the hub: s3://, gs://, facebook/dinov2-base"
    return (
        f"{local.key}: '{local.value}' lies on this machine alone, and the nodes of the cluster cannot see it. Ways "
        "out: (1) --upload-data sends it along; (2) an absolute path of a folder that all nodes share, with "
        f"--set {local.key}=/...; (3) {other}"
    )


def _upload_or_pack(
    local: LocalPath, paths: Sequence[Path], storage: str, say: Callable[[str], None]
) -> tuple[str, Files]:
    """Uploads files if the storage is a bucket. Returns where the job finds them, and the files to pack."""
    _check_relative(local, paths)
    names = {path.relative_to(local.folder).as_posix(): path for path in paths}
    rest = f"/{local.path.name}" if local.path.is_file() else ""
    if not is_bucket(storage):
        inside = f"{UPLOADED}/{local.key}/{local.folder.name}"
        return inside + rest, {f"{inside}/{name}": path for name, path in names.items()}
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in names.items()]
    uri = f"{storage}/.data/{local.folder.name}-{signature(stats)}"
    say(f"uploading {len(names):,} files, {sum(size for _, size, _ in stats) / 1e6:,.1f} MB, to {uri}")
    upload({f"{uri}/{name}": path for name, path in names.items()})
    return uri + rest, {}


def _check_relative(local: LocalPath, paths: Sequence[Path]) -> None:
    """Checks that a table names only images in its own folder or below, so that the nodes find them."""
    problem = next((path for path in paths if not path.is_relative_to(local.folder)), None)
    if problem is None and local.path.is_file() and local.path.suffix != ".parquet":
        table = decode_text(local.path.read_bytes())
        if str(local.folder) in table:
            problem = next((path for path in paths if path != local.path and str(path) in table), None)
    if problem is not None:
        raise ConfigError(
            f"{local.key}: {local.path} names {problem}, which the nodes would not find; accepted with --upload-data: "
            "paths relative to the table, of files beside it or in folders below"
        )


def _write(target: Path, files: Mapping[str, Path]) -> None:
    """Writes the zip file. Raises an error as soon as it is too large."""
    with zipfile.ZipFile(target, "w") as package, target.open("rb") as written:
        for name, path in sorted(files.items()):
            with _name_file_in_error(path):
                entry = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
                entry.compress_type = zipfile.ZIP_DEFLATED
                with path.open("rb") as source, package.open(entry, "w", force_zip64=True) as packed:
                    while chunk := source.read(CHUNK):
                        packed.write(chunk)
                        if os.fstat(written.fileno()).st_size > LIMIT:
                            raise ConfigError(_too_large_message(files))
    if target.stat().st_size > LIMIT:  # checked again, because the last bytes are written when the file is closed
        raise ConfigError(_too_large_message(files))


@contextmanager
def _name_file_in_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "leave it out with .gitignore, or make it readable"
        raise ConfigError(f"{path}: cannot be packed ({error.strerror or error}); {hint}") from error


def _too_large_message(files: Mapping[str, Path]) -> str:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    return (
        f"the working directory ({sum(sizes.values()) / 2**20:,.0f} MiB in {len(files):,} files; the largest: "
        f"{largest}, {sizes[largest] / 2**20:,.0f} MiB) makes a package of more than the {LIMIT / 2**20:,.0f} MiB that "
        "Ray takes. "
        "Ways out: (1) .gitignore keeps files out; (2) data and weights lie where all nodes see them, in a shared "
        "folder or a bucket; (3) storage: s3://... or gs://..., where --upload-data sends them"
    )


def requirements(constraints: Path) -> list[str]:
    """Returns raysweep's direct and indirect requirements except Ray, pinned (`name==version`) and sorted.

    Args:
        constraints: File of `name==version` lines. A package that it lacks gets the version installed here.
    """
    lines = constraints.read_text().splitlines() if constraints.exists() else []
    pins = {_normalized_name(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    versions: dict[str, str] = {}
    pending: list[tuple[str, Sequence[str]]] = [("raysweep", ())]
    seen = set()
    while pending:
        name, extras = pending.pop()
        for needed, its_extras in _installed_requirements(name, extras):
            if (needed, its_extras) not in seen:
                seen.add((needed, its_extras))
                pending.append((needed, its_extras))
                if needed not in PROVIDED_BY_NODES:
                    # A local version label, as in 2.13.0+cpu, is on no package index.
                    versions[needed] = pins.get(needed) or distribution(needed).version.partition("+")[0]
    return [f"{name}=={version.strip()}" for name, version in sorted(versions.items())]


def _installed_requirements(name: str, extras: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the installed distributions that one distribution requires, each with the required extras."""
    from packaging.requirements import Requirement

    needs = []
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            needed = _normalized_name(requirement.name)
            try:
                distribution(needed)
            except PackageNotFoundError:  # required on another platform only
                continue
            needs.append((needed, tuple(sorted(requirement.extras))))
    return needs


def _normalized_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
