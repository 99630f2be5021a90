"""The files of a folder that git tracks or does not ignore, listed without the configuration of any repository."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from raysweep.errors import ConfigError
from raysweep.storage.git import run_git

MAX_LINK_LENGTH = 4096  # bytes of a `.git` file, which names the folder of the repository


def working_files(folder: Path) -> list[str]:
    """Returns relative names of a folder's files that git tracks or does not ignore, nested repositories included.

    A symbolic link is listed as a file, and not followed.

    Raises:
        ConfigError: git is not installed, or fails.
    """
    found = []
    for name in _ask_git(folder, ["--cached", "--others"]):
        path = folder / name
        if path.is_symlink() or path.is_file():  # git also lists deleted files
            found.append(name)
        elif (path / ".git").exists():
            found += [f"{name.rstrip('/')}/{inner}" for inner in working_files(path)]
    return sorted(set(found))


def ignored_files(folder: Path) -> list[str]:
    """Returns relative names of what git ignores in a folder. A folder that is ignored ends with a slash.

    Raises:
        ConfigError: git is not installed, or fails.
    """
    return sorted(_ask_git(folder, ["--others", "--ignored", "--directory"]))


def _ask_git(folder: Path, wanted: list[str]) -> list[str]:
    """Runs `git ls-files` with an empty repository of our own, and the index and .gitignore files that are there."""
    if shutil.which("git") is None:
        raise ConfigError("git is not installed; it is asked what .gitignore keeps out of the package")
    with tempfile.TemporaryDirectory() as empty:
        run_git(folder, "init", "--quiet", "--template=", empty)
        top = _find_top(folder)
        if top is not None and _is_ignored(folder, top, empty):  # as by a repository of dotfiles in a home folder
            top = None
        repository = [f"--git-dir={empty}/.git", f"--work-tree={top or folder}"]
        index, excluded = _index_and_excluded(top) if top else (None, None)
        command = ["ls-files", "-z", *wanted, "--exclude-standard"]
        command += [f"--exclude-from={excluded}"] if excluded else []
        listed = run_git(folder, *repository, *command, index=index)
        if listed.returncode:  # the index is of another kind: then only ignored files that are tracked are missed
            listed = run_git(folder, *repository, *command)
    if listed.returncode:
        raise ConfigError(f"{folder}: git cannot list it ({' '.join(listed.stderr.decode().split())})")
    names = os.fsdecode(listed.stdout).split("\0")
    # An index is a file that others may have written: its names must not lead out of the folder.
    return [name for name in names if name and not {"", ".", "..", ".git"} & set(name.rstrip("/").split("/"))]


def _find_top(folder: Path) -> Path | None:
    """Returns the nearest folder, from `folder` upwards, that is a repository."""
    return next((path for path in (folder, *folder.parents) if _git_folder(path) is not None), None)


def _git_folder(path: Path) -> Path | None:
    """Returns the folder in which a repository keeps its index. For a worktree or submodule, a file names it."""
    folder = path / ".git"
    if folder.is_file():
        with folder.open("rb") as file:
            key, _, value = os.fsdecode(file.read(MAX_LINK_LENGTH)).partition(":")
        folder = path / value.strip() if key == "gitdir" else folder
        return folder if folder.is_dir() else None
    return folder if (folder / "objects").is_dir() and (folder / "refs").is_dir() else None


def _index_and_excluded(top: Path) -> tuple[Path | None, Path | None]:
    """Returns the files of a repository that say which files are tracked, and which are ignored here only."""
    folder = _git_folder(top)
    if folder is None:
        return None, None
    common = folder / "commondir"  # a worktree shares its exclusions
    shared = folder / common.read_text().strip() if common.is_file() else folder
    index, excluded = (folder / "index").resolve(), (shared / "info" / "exclude").resolve()
    return index if index.is_file() else None, excluded if excluded.is_file() else None


def _is_ignored(folder: Path, top: Path, empty: str) -> bool:
    repository = [f"--git-dir={empty}/.git", f"--work-tree={top}"]
    return run_git(top, *repository, "check-ignore", "--quiet", str(folder)).returncode == 0
