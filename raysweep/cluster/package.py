"""What travels to a cluster with a submitted sweep: the working directory, the versions it needs, and local data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import raysweep
from raysweep.errors import ConfigError
from raysweep.experiment.config import DataConfig, Experiment
from raysweep.images.listing import list_source, local_files
from raysweep.images.tables import absolute_source
from raysweep.storage.copies import is_bucket, upload
from raysweep.storage.paths import signature

LIMIT = 100 * 2**20  # bytes that the dashboard of Ray takes in one request
# Whatever .gitignore says: secrets, and what a sweep leaves.
LEFT_OUT = {
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".env",
    ".ssh",
    ".aws",
    ".ray",
    "mlruns",
    "mlartifacts",
    "mlflow.db",
}
UPLOADED = "uploaded"  # folder of the package for what --upload-data adds
CLUSTERS_OWN = {"ray"}  # whose version must be that of the nodes
CHUNK = 2**20

Files = dict[str, Path]  # by name, with slashes, in the package


@dataclass(frozen=True)
class LocalPath:
    """A key of an experiment whose value is a file or folder of this machine; `path` is absolute."""

    key: str
    value: str
    path: Path

    @property
    def is_relative(self) -> bool:
        """Whether it means a place in the working directory, as it is and as the job finds it."""
        return "://" not in self.value and not Path(self.value).expanduser().is_absolute()

    @property
    def folder(self) -> Path:
        """What names within it are relative to: tables name their images relative to themselves."""
        return self.path.parent if self.path.is_file() else self.path


def local_paths(experiment: Experiment) -> list[LocalPath]:
    """The images and weights of an experiment, in as far as they lie on this machine or claim to.

    Raises:
        ConfigError: a relative path leads nowhere.
    """
    values = {"data.source": experiment.data.source}
    for number, encoder in enumerate(experiment.encoders):
        if encoder.pretrained_model_name_or_path:
            values[f"encoders.{number}.pretrained_model_name_or_path"] = encoder.pretrained_model_name_or_path
    found = []
    for key, value in values.items():
        absolute = absolute_source(value)
        local = LocalPath(key, value, Path(absolute))
        # What is no path is the name of weights on the hub.
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
    say: Callable[[str], None] = lambda _text: None,
) -> tuple[str, list[str]]:
    """Packs the working directory, as .gitignore says, with the experiment file and raysweep itself.

    Args:
        target: the zip file to be made.
        experiment_file: as it was named.
        experiment: what is in it.
        upload_data: whether local images and weights go along, into the storage where that is a bucket.
        say: told what takes long.

    Returns:
        The experiment file's path within the package, and `KEY=VALUE` settings that lead to what was uploaded.

    Raises:
        ConfigError: the cluster would not see something that the experiment names, or the package is too large.
        DataError: the images cannot be listed.
    """
    here = Path.cwd()
    results = _name_inside(Path(experiment.storage).expanduser()) or ".."
    files = {name: here / name for name in working_files(here) if not name.startswith(f"{results}/")}
    inside = _name_inside(experiment_file)
    if inside not in files:
        inside = f"{UPLOADED}/{experiment_file.name}"
        files[inside] = experiment_file
    if "raysweep/__init__.py" not in files:
        folder = Path(raysweep.__file__).parent
        modules = [name for name in local_files(str(folder)) if name.endswith((".py", ".typed"))]
        files |= {f"raysweep/{name}": folder / name for name in modules}
    settings = []
    for local in local_paths(experiment):
        if not (local.is_relative or upload_data):  # it may be a place that all nodes share
            continue
        if not local.path.exists():
            raise ConfigError(f"{local.key}: {local.path}: no such file or folder")
        paths = _files_of(local, experiment.data)
        if local.is_relative and all(_name_inside(path) in files for path in paths):
            continue
        if not upload_data:
            raise ConfigError(_invisible(local))
        place, added = _send(local, paths, experiment.storage, say)
        files |= added
        settings.append(f"{local.key}={json.dumps(place, ensure_ascii=False)}")
    _write(target, files)
    return inside, settings


def working_files(folder: Path) -> list[str]:
    """Names of the files below a folder that no .gitignore keeps out, as git lists them; links are followed.

    Raises:
        ConfigError: git is not there, or refuses.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        environment = os.environ | {"LC_ALL": "C"}
        return subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, check=False)

    if shutil.which("git") is None:
        raise ConfigError("git is not installed; it is asked what .gitignore keeps out of the package")
    with tempfile.TemporaryDirectory() as empty:
        repository: list[str] = []
        is_outside = b"not a git repository" in git("rev-parse").stderr
        if is_outside or git("check-ignore", "--quiet", str(folder)).returncode == 0:  # such as a home of dotfiles
            git("init", "--quiet", empty)
            repository = [f"--git-dir={empty}/.git", f"--work-tree={folder}"]
        listed = git(*repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        raise ConfigError(f"{folder}: git cannot list it ({' '.join(listed.stderr.decode().split())})")
    found = []
    for name in os.fsdecode(listed.stdout).split("\0"):
        path = folder / name
        if name and path.is_dir():  # a link to a folder, or a repository of its own
            within = working_files(path) if (path / ".git").exists() else local_files(str(path))
            found += [f"{name.rstrip('/')}/{inner}" for inner in within]
        elif path.is_file():  # and not one that git knows, but that is gone
            found.append(name)
    return sorted(name for name in set(found) if not LEFT_OUT & set(name.split("/")))


def _name_inside(path: Path) -> str | None:
    """A path relative to the working directory, None outside of it."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else None


def _files_of(local: LocalPath, data: DataConfig) -> list[Path]:
    """The files that a local path stands for: of data the images and tables that would be read."""
    if local.key != "data.source":
        return [local.folder / name for name in local_files(str(local.folder))]
    paths = {Path(row.path) for row in list_source(data).rows if "://" not in row.path}
    return sorted(path for path in {*paths, local.path} if path.is_file())


def _invisible(local: LocalPath) -> str:
    other = "images in a bucket or on the hub: s3://, gs://, hf://datasets/..."
    if local.key != "data.source":
        other = "weights in a bucket or on the hub: s3://, gs://, facebook/dinov2-base"
    return (
        f"{local.key}: '{local.value}' lies on this machine alone, and the nodes of the cluster cannot see it. Ways "
        "out: (1) --upload-data sends it along; (2) an absolute path of a folder that all nodes share, with "
        f"--set {local.key}=/...; (3) {other}"
    )


def _send(local: LocalPath, paths: Sequence[Path], storage: str, say: Callable[[str], None]) -> tuple[str, Files]:
    """Sends files to the bucket that is the storage, or has them packed; returns where the job finds them."""
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
    """Refuses a table whose images the nodes would look for elsewhere than beside it."""
    problem = next((path for path in paths if not path.is_relative_to(local.folder)), None)
    if problem is None and local.path.is_file() and local.path.suffix != ".parquet":
        table = local.path.read_text(encoding="utf-8-sig")
        if str(local.folder) in table:
            problem = next((path for path in paths if path != local.path and str(path) in table), None)
    if problem is not None:
        raise ConfigError(
            f"{local.key}: {local.path} names {problem}, which the nodes would not find; accepted with --upload-data: "
            "paths relative to the table, of files beside it or in folders below"
        )


def _write(target: Path, files: Mapping[str, Path]) -> None:
    """Writes the zip file, and gives up as soon as it is too large."""
    with zipfile.ZipFile(target, "w") as package, target.open("rb") as written:
        for name, path in sorted(files.items()):
            with _naming(path):
                entry = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
                entry.compress_type = zipfile.ZIP_DEFLATED
                with path.open("rb") as source, package.open(entry, "w", force_zip64=True) as packed:
                    while chunk := source.read(CHUNK):
                        packed.write(chunk)
                        if os.fstat(written.fileno()).st_size > LIMIT:
                            raise ConfigError(_too_large(files))
    if target.stat().st_size > LIMIT:  # of what was still on its way to the disk
        raise ConfigError(_too_large(files))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "leave it out with .gitignore, or mend it"
        raise ConfigError(f"{path}: cannot be packed ({error.strerror or error}); {hint}") from error


def _too_large(files: Mapping[str, Path]) -> str:
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
                    # Without a build's own name, as in 2.13.0+cpu: no index has that.
                    found[needed] = pins.get(needed) or distribution(needed).version.partition("+")[0]
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
