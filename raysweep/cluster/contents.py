"""What a package contains, what stays out of it and why, and the text that says so."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raysweep.cluster.packing_rules import (
    NOT_NEEDED,
    follow_links,
    grouped,
    is_reached_by_link,
    reason_in_named_folder,
    reason_of_name,
    reason_to_leave_out,
)
from raysweep.cluster.working_files import ignored_files
from raysweep.errors import ConfigError
from raysweep.images.folder_files import local_files

Files = dict[str, Path]  # keys are names in the package, with slashes
IGNORED = "named in .gitignore"
MAX_SHOWN = 20  # names of a list


@dataclass(frozen=True, slots=True)
class Contents:
    """The files of a package by their names in it, and the reason of each file that stays out."""

    files: Files = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def described(self) -> str:
        """Returns count, size and the first names of what is packed, and what stays out by reason."""
        size = sum(path.stat().st_size for path in self.files.values() if path.is_file())
        lines = [f"the package: {len(self.files):,} files, {size / 1e6:,.1f} MB before they are compressed"]
        own = sorted(name for name in self.files if not name.startswith("raysweep/"))
        lines += [f"  {_printable(name)}" for name in own[:MAX_SHOWN]]
        lines += [f"  and {len(own) - MAX_SHOWN:,} more"] if len(own) > MAX_SHOWN else []
        lines += [f"  and raysweep itself, {len(self.files) - len(own):,} files"]
        if self.left_out:
            lines.append("left out (--include PATH sends a file or folder all the same):")
        for reason, left in grouped(self.left_out).items():
            more = f" and {len(left) - MAX_SHOWN:,} more" if len(left) > MAX_SHOWN else ""
            lines.append(f"  {reason}: {', '.join(map(_printable, left[:MAX_SHOWN]))}{more}")
        return "\n".join(lines)


def choose_files(
    folder: Path, listed: Sequence[str], *, results: str, named: Sequence[str], include: Sequence[str]
) -> Contents:
    """Chooses the files of the working directory that are packed.

    Args:
        folder: The working directory.
        listed: Its files that git tracks or does not ignore, by relative name. A link is one of them, not followed.
        results: Relative name of the folder of results, which stay out.
        named: Relative names of the files and folders that the experiment names. Links in them may lead out.
        include: Paths that the user has named for the package. They are packed even if git ignores them.

    Raises:
        ConfigError: A path of `include` is missing or lies outside of the working directory.
    """
    contents, links = Contents(), []
    for name in listed:
        owner = next((path for path in named if name == path or name.startswith(f"{path}/")), None)
        if name.startswith(f"{results}/"):
            contents.left_out[name] = NOT_NEEDED
        elif owner is not None:
            _add_named(contents, folder, owner, _files_below(folder, name))
        elif reason := reason_of_name(name.split("/")):
            contents.left_out[name] = reason
        elif is_reached_by_link(folder, name):
            links.append(name)
        elif reason := reason_to_leave_out(name, folder / name):
            contents.left_out[name] = reason
        else:
            contents.files[name] = folder / name
    linked, left_out = follow_links(folder, links, set(contents.files))
    contents.files.update(linked)
    contents.left_out.update(left_out)
    for path in include:
        name = _name_within(folder, path)
        _add_named(contents, folder, name, _files_below(folder, name))
    packed = {*contents.files, *(name[: place + 1] for name in contents.files for place in _slashes(name))}
    contents.left_out.update({name: IGNORED for name in ignored_files(folder) if name not in packed})
    return contents


def _slashes(name: str) -> list[int]:
    return [place for place, character in enumerate(name) if character == "/"]


def _files_below(folder: Path, name: str) -> Iterator[str]:
    """Yields a file's name, or the names of the files in a folder or behind a link to one, without hidden ones."""
    if (folder / name).is_dir():
        yield from (f"{name}/{inner}" for inner in local_files(str(folder / name)))
    else:
        yield name


def _add_named(contents: Contents, folder: Path, owner: str, names: Iterator[str]) -> None:
    for name in names:
        path = folder / name
        reason = reason_in_named_folder(path, folder / owner) if name != owner else None
        if reason:
            contents.left_out[name] = reason
        elif path.is_file():
            contents.files[name] = path
            contents.left_out.pop(name, None)


def _name_within(folder: Path, path: str) -> str:
    absolute = Path(os.path.abspath(folder / Path(path).expanduser()))
    if not absolute.exists():
        raise ConfigError(f"--include: '{path}': no such file or folder")
    if not absolute.is_relative_to(folder) or absolute == folder:
        raise ConfigError(f"--include: '{path}' lies outside of the working directory; accepted: a path in {folder}")
    return absolute.relative_to(folder).as_posix()


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
