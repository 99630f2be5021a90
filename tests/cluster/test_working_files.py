import os
import subprocess

import pytest

from raysweep.cluster.working_files import ignored_files, working_files
from raysweep.errors import ConfigError


def git(folder, *arguments):
    person = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b.c",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "protocol.file.allow=always",
    ]
    subprocess.run(["git", *person, *arguments], cwd=folder, check=True, capture_output=True)


def write(folder, *names, text="text"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def started(tmp_path):
    """A file that a program makes when git starts it; `started.program` is that program."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho > {tmp_path}/started\n")
    program.chmod(0o755)
    return tmp_path / "started", str(program)


@pytest.mark.parametrize("where", [".", "inner", "a/b/inner"])
def test_no_repository_starts_a_program(tmp_path, started, where):
    made, program = started
    folder = tmp_path / "project"
    write(folder, "file", f"{where}/kept", f"{where}/left")
    git(folder / where, "init", "-q")
    write(folder, f"{where}/.gitignore", text="left\n")
    git(folder / where, "config", "core.fsmonitor", program)
    git(folder / where, "config", "core.hooksPath", str(tmp_path))
    names = working_files(folder)
    assert not made.exists()
    prefix = "" if where == "." else f"{where}/"
    assert {f"{prefix}kept", "file"} <= set(names)
    assert f"{prefix}left" not in names


def test_a_repository_that_includes_another_configuration_starts_none(tmp_path, started):
    made, program = started
    folder = tmp_path / "project"
    write(folder, "file", "inner/file")
    git(folder / "inner", "init", "-q")
    write(tmp_path, "configuration", text=f"[core]\n\tfsmonitor = {program}\n\tworktree = /\n")
    git(folder / "inner", "config", "include.path", str(tmp_path / "configuration"))
    assert working_files(folder) == ["file", "inner/file"]
    assert not made.exists()


def test_a_submodule_and_a_worktree_are_listed(tmp_path):
    write(tmp_path, "library/code.py", "library/left.log", "main/file")
    for name in ("library", "main"):
        git(tmp_path / name, "init", "-q")
    write(tmp_path, "library/.gitignore", text="*.log\n")
    git(tmp_path / "library", "add", ".gitignore", "code.py")
    git(tmp_path / "library", "commit", "-qm", "first")
    git(tmp_path / "main", "submodule", "add", "-q", str(tmp_path / "library"), "library")
    write(tmp_path, "main/library/new.py", "main/library/new.log")
    assert working_files(tmp_path / "main") == [
        ".gitmodules", "file", "library/.gitignore", "library/code.py", "library/new.py",
    ]  # fmt: skip
    git(tmp_path / "library", "worktree", "add", "-q", str(tmp_path / "tree"))
    write(tmp_path, "library/.git/info/exclude", text="private\n")
    write(tmp_path, "tree/private", "tree/new.py")
    assert working_files(tmp_path / "tree") == [".gitignore", "code.py", "new.py"]


def test_what_is_tracked_is_listed_although_it_is_ignored(tmp_path):
    write(tmp_path, "kept.log", "left.log", "sub/kept.log")
    write(tmp_path, ".gitignore", text="*.log\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-f", "kept.log", "sub/kept.log")
    assert working_files(tmp_path) == [".gitignore", "kept.log", "sub/kept.log"]
    assert working_files(tmp_path / "sub") == ["kept.log"]
    assert ignored_files(tmp_path) == ["left.log"]


def test_an_index_of_another_kind_is_passed_over(tmp_path):
    write(tmp_path, "file", "left.log")
    write(tmp_path, ".gitignore", text="*.log\n")
    git(tmp_path, "init", "-q", "--object-format=sha256")
    git(tmp_path, "add", "file")
    assert working_files(tmp_path) == [".gitignore", "file"]


def test_an_index_that_names_files_elsewhere_is_not_believed(tmp_path):
    """An index is a file of the repository: who made an archive of it wrote it."""
    write(tmp_path, "secret", "project/file")
    folder = tmp_path / "project"
    git(folder, "init", "-q")
    git(folder, "add", "file")
    blob = subprocess.run(["git", "rev-parse", ":file"], cwd=folder, check=True, capture_output=True, text=True).stdout
    git(folder, "update-index", "--add", "--cacheinfo", f"100644,{blob.strip()},xx/secret")
    index = folder / ".git" / "index"
    import hashlib

    changed = index.read_bytes()[:-20].replace(b"xx/secret", b"../secret")
    index.write_bytes(changed + hashlib.sha1(changed).digest())
    assert working_files(folder) == ["file"]


def test_ignored_folders_are_named_once(tmp_path):
    write(tmp_path, "runs/a", "runs/b/c", "kept", "x.log")
    write(tmp_path, ".gitignore", text="runs/\n*.log\n")
    assert ignored_files(tmp_path) == ["runs/", "x.log"]


def test_links_are_listed_and_pipes_are_not(tmp_path):
    write(tmp_path, "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "broken").symlink_to("nowhere")
    assert working_files(tmp_path) == ["broken", "file", "link"]


def test_names_of_any_bytes_are_listed(tmp_path):
    for name in (b"a b", b"gr\xc3\xb6\xc3\x9fer", b"bad\xff", b"two\nlines"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
            pass
    assert sorted(map(os.fsencode, working_files(tmp_path))) == [
        b"a b", b"bad\xff", b"gr\xc3\xb6\xc3\x9fer", b"two\nlines",
    ]  # fmt: skip


def test_without_git_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for function in (working_files, ignored_files):
        with pytest.raises(ConfigError, match=r"git is not installed; it is asked what .gitignore keeps out"):
            function(tmp_path)
