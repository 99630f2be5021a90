"""Every file name that raysweep writes, and the few file operations that must never leave half a file."""

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.errors import ConfigError, DataError


def signature(value: Any) -> str:
    """Returns 16 hex digits of the SHA-256 of `value` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(name: str) -> str:
    """Returns `name` with everything that is awkward in a file name replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "unnamed"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error


@dataclass(frozen=True)
class SweepPaths:
    """Every place that a sweep writes to. Caches are shared by all sweeps of one storage.

    Raises:
        ConfigError: the storage is not a folder that this machine can write to.
    """

    storage: Path
    name: str

    def __post_init__(self) -> None:
        # A Path has one slash where the URI had two.
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(self.storage)):
            raise ConfigError(f"storage: '{self.storage}' is a URI; accepted so far: a local or shared folder")
        above = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not above.is_dir():
            raise ConfigError(f"storage: '{self.storage}' cannot be a folder: {above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ConfigError(f"storage: '{self.storage}' cannot be used: no permission to write to {above}")

    @property
    def root(self) -> Path:
        """The sweep's own folder."""
        return self.storage.resolve() / self.name

    @property
    def caches(self) -> Path:
        """Caches and what else all sweeps of one storage share."""
        return self.storage.resolve() / ".cache"

    def cache(self, kind: str, key: str) -> Path:
        """A feature or pixel cache, by signature."""
        return self.caches / f"{kind}-{key}"

    @property
    def has_features(self) -> bool:
        """Whether any sweep of this storage has cached features of any encoder."""
        return any(self.caches.glob("features-*/manifest.json"))

    @property
    def optuna_journal(self) -> Path:
        """The Optuna studies of all invocations."""
        return self.root / "optuna.journal"

    @property
    def tune(self) -> Path:
        """What Ray Tune writes while it runs."""
        return self.root / "tune"

    def study(self, study: str, key: str) -> Path:
        """Checkpoints and the result of one study; `key` is the signature of all that its results depend on."""
        return self.root / "studies" / study / key

    def study_result(self, study: str, key: str) -> Path:
        """What a finished study found; it is not evaluated again while this stands for the same trials."""
        return self.study(study, key) / "result.json"

    def model(self, study: str) -> Path:
        """The exported model of one study."""
        return self.root / "models" / study

    @property
    def leaderboard_json(self) -> Path:
        """The leaderboard, as a list of rows."""
        return self.root / "leaderboard.json"

    @property
    def leaderboard_csv(self) -> Path:
        """The same rows as a table."""
        return self.root / "leaderboard.csv"

    @property
    def resolved_experiment(self) -> Path:
        """The experiment with every default filled in."""
        return self.root / "experiment.resolved.yaml"

    @property
    def quarantine(self) -> Path:
        """Images that could not be used, and why."""
        return self.root / "quarantine.csv"
