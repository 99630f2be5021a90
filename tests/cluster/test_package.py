import json
import os
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from raysweep.cluster import package as packages
from raysweep.cluster.package import build_package, requirements
from raysweep.errors import ConfigError
from raysweep.experiment.config import load_experiment

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory under a home of its own, and a function that packs it: (names, entry, settings)."""
    here = tmp_path / "project"
    (here / "experiments").mkdir(parents=True)
    (here / "notes.txt").write_text("notes")
    (here / ".gitignore").write_text("runs/\nimages/\n*.log\n")
    for name in ("runs/x/leaderboard.json", "big.log", ".git/HEAD", "src/.gitignore", "src/kept.py", "src/secret.key"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("*.key\n" if name.endswith(".gitignore") else "text")
    monkeypatch.chdir(here)

    def pack(source="sklearn://digits", upload_data=False, file="experiments/x.yaml", **keys):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        encoder = {"type": "stacked_cnn"} | keys.pop("encoder", {})
        Path(file).write_text(json.dumps({"data": {"source": source}, "encoders": [encoder], **keys}))
        target = tmp_path / "package.zip"
        target.unlink(missing_ok=True)
        entry, settings = build_package(target, Path(file), load_experiment(file), upload_data=upload_data)
        return set(zipfile.ZipFile(target).namelist()), entry, settings

    return pack


def make_images(folder):
    for name in ("cat/1.png", "dog/2.png"):
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(b"png")


# The working directory


def test_gitignored_files_stay_here(project):
    names, entry, settings = project()
    assert (entry, settings) == ("experiments/x.yaml", [])
    assert {"experiments/x.yaml", "notes.txt", "src/kept.py"} <= names
    left = [n for n in names if n.startswith(("runs/", ".git/")) or n in ("big.log", "src/secret.key")]
    assert [name for name in left if not name.endswith("/")] == []


def test_raysweep_itself_goes_along_and_can_be_run(project, tmp_path):
    names, _, _ = project()
    assert {"raysweep/run.py", "raysweep/training/loop.py"} <= names
    assert not [name for name in names if "__pycache__" in name]
    zipfile.ZipFile(tmp_path / "package.zip").extractall(tmp_path / "node")
    code = "import raysweep; print(raysweep.__file__)"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "node", capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == str(tmp_path / "node" / "raysweep" / "__init__.py")


def test_an_experiment_from_elsewhere_goes_along_under_its_name(project, tmp_path):
    names, entry, _ = project(file=str(tmp_path / "elsewhere" / "beans.yaml"))
    assert entry == "uploaded/beans.yaml"
    assert entry in names


def test_an_ignored_experiment_goes_along_all_the_same(project):
    names, entry, _ = project(file="images/x.yaml")
    assert entry == "uploaded/x.yaml"
    assert entry in names


def test_a_package_too_large_for_ray_is_refused(project, monkeypatch):
    monkeypatch.setattr(packages, "LIMIT", 100_000)
    Path("noise.bin").write_bytes(os.urandom(3_000_000))
    monkeypatch.setattr(packages, "CHUNK", 10_000)
    with pytest.raises(
        ConfigError, match=r"the largest: noise.bin, 3 MiB\) makes a package of more than the .* Ray takes"
    ):
        project()


def test_the_limit_is_that_of_rays_dashboard():
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert packages.LIMIT <= DASHBOARD_CLIENT_MAX_SIZE


def test_a_repositorys_ignored_files_stay_here_from_its_folders_too(project, monkeypatch):
    subprocess.run(["git", "init", "-q", ".."], check=True)
    Path("../.gitignore").write_text("/project/private/\n*.secret\n")
    for name in ("private/a.txt", "b.secret", ".env", "mlruns/1/meta.yaml", "tracked.txt", "gone.txt"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text("text")
    subprocess.run(["git", "add", "tracked.txt", "gone.txt"], check=True)
    Path("gone.txt").unlink()
    names, _, _ = project()
    assert {"tracked.txt", "notes.txt"} <= names
    assert not {"private/a.txt", "b.secret", ".env", "mlruns/1/meta.yaml", "gone.txt", "big.log"} & names


def test_results_and_secrets_stay_here_without_gitignore_too(project):
    Path(".gitignore").unlink()
    for name in ("out/x/models/a.bin", ".env", ".ssh/id_rsa", ".ray/auth_token", "mlflow.db", "kept/out/a.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    names, _, _ = project(storage="out")
    assert "kept/out/a.txt" in names
    assert not [name for name in names if name.startswith(("out/", ".env", ".ssh", ".ray", "mlflow.db"))]


def test_links_and_repositories_within_are_followed(project, tmp_path):
    make_images(tmp_path / "elsewhere")
    Path("data").symlink_to(tmp_path / "elsewhere")
    subprocess.run(["git", "init", "-q", "inner"], check=True)
    Path("inner/.gitignore").write_text("left\n")
    for name in ("left", "kept"):
        Path(f"inner/{name}").write_text("text")
    names, _, settings = project(source="data")
    assert {"data/cat/1.png", "data/dog/2.png", "inner/kept"} <= names
    assert "inner/left" not in names
    assert settings == []


def test_a_repository_above_that_ignores_all_is_no_reason_to_pack_nothing(project):
    subprocess.run(["git", "init", "-q", ".."], check=True)  # as of dotfiles in a home
    Path("../.gitignore").write_text("*\n")
    names, _, _ = project()
    assert {"notes.txt", "src/kept.py"} <= names
    assert not {"big.log", "runs/x/leaderboard.json"} & names


def test_a_file_that_is_gone_when_it_is_packed_is_named(project, monkeypatch):
    monkeypatch.setattr(packages, "local_paths", lambda experiment: Path("notes.txt").unlink() or [])
    with pytest.raises(ConfigError, match=r"notes.txt: cannot be packed \(No such file or directory\)"):
        project()


def test_without_git_it_is_asked_for(project, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"git is not installed; it is asked what .gitignore keeps out"):
        project()


def test_times_before_zip_files_are_no_reason(project):
    os.utime("notes.txt", (0, 0))
    assert "notes.txt" in project()[0]


# Data


def test_data_that_is_packed_needs_nothing(project):
    make_images("data")
    names, _, settings = project(source="data")
    assert "data/cat/1.png" in names
    assert settings == []


@pytest.mark.parametrize("source", ["images", "../images"])
def test_data_that_the_nodes_cannot_see_is_explained(project, source):
    make_images(source)
    with pytest.raises(ConfigError) as error:
        project(source=source)
    assert str(error.value).startswith(f"data.source: '{source}' lies on this machine alone")
    assert all(way in str(error.value) for way in ("--upload-data", "--set data.source=/", "s3://"))


@pytest.mark.parametrize("source", ["images", "../images"])
def test_data_goes_along_when_asked(project, source):
    make_images(source)
    names, _, settings = project(source=source, upload_data=True)
    assert settings == ['data.source="uploaded/data.source/images"']
    assert {"uploaded/data.source/images/cat/1.png", "uploaded/data.source/images/dog/2.png"} <= names


@pytest.mark.parametrize("ignored", ["images/dog/", "images/*\n!images/.gitkeep"])
def test_data_of_which_a_part_is_packed_is_not_there(project, ignored):
    make_images("images")
    Path("images/.gitkeep").write_text("")
    Path(".gitignore").write_text(f"{ignored}\n")
    with pytest.raises(ConfigError, match=r"data.source: 'images' lies on this machine alone"):
        project(source="images")
    names, _, settings = project(source="images", upload_data=True)
    assert settings == ['data.source="uploaded/data.source/images"']
    assert {"uploaded/data.source/images/cat/1.png", "uploaded/data.source/images/dog/2.png"} <= names


def test_a_table_is_no_use_without_its_images(project):
    make_images("images")
    Path("index.csv").write_text("path,label\nimages/cat/1.png,cat\nimages/dog/2.png,dog\n")
    with pytest.raises(ConfigError, match=r"data.source: 'index.csv' lies on this machine alone"):
        project(source="index.csv")
    names, _, settings = project(source="index.csv", upload_data=True)
    assert settings == ['data.source="uploaded/data.source/project/index.csv"']
    sent = {name for name in names if name.startswith("uploaded/")}
    inside = "uploaded/data.source/project"
    assert sent == {f"{inside}/index.csv", f"{inside}/images/cat/1.png", f"{inside}/images/dog/2.png"}
    Path(".gitignore").unlink()
    assert project(source="index.csv")[2] == []


@pytest.mark.parametrize("path", ["../other/cat/1.png", "{here}/images/cat/1.png"])
def test_a_table_that_names_images_elsewhere_is_refused(project, path):
    for folder in ("images", "other"):
        make_images(folder)
    Path("images/index.csv").write_text(f"path,label\n{path.format(here=Path.cwd())},cat\n")
    with pytest.raises(ConfigError, match=r"images/index.csv names .*/cat/1.png, which the nodes would not find"):
        project(source="images/index.csv", upload_data=True)


def test_linked_classes_go_along(project, tmp_path):
    make_images("images")
    make_images(tmp_path / "elsewhere")
    Path("images/linked").symlink_to(tmp_path / "elsewhere" / "cat")
    names, _, _ = project(source="images", upload_data=True)
    assert "uploaded/data.source/images/linked/1.png" in names


def test_names_that_yaml_would_read_otherwise_are_quoted(project):
    make_images("images: a #1")
    _, _, settings = project(source="images: a #1", upload_data=True)
    assert settings == []  # it is packed
    Path(".gitignore").write_text("images*\n")
    _, _, (setting,) = project(source="images: a #1", upload_data=True)
    loaded = load_experiment("experiments/x.yaml", [setting])
    assert loaded.data.source == "uploaded/data.source/images: a #1"


def test_a_table_goes_along_with_the_images_beside_it(project):
    make_images("images")
    Path("images/index.csv").write_text("path,label\ncat/1.png,cat\n")
    names, _, settings = project(source="images/index.csv", upload_data=True)
    assert settings == ['data.source="uploaded/data.source/images/index.csv"']
    assert {"uploaded/data.source/images/index.csv", "uploaded/data.source/images/cat/1.png"} <= names


def test_an_absolute_path_may_be_one_that_all_nodes_share(project, tmp_path):
    make_images(tmp_path / "shared")
    names, _, settings = project(source=str(tmp_path / "shared"))
    assert (settings, [name for name in names if name.startswith("uploaded")]) == ([], [])
    uri = f"file://{tmp_path}/shared"
    assert project(source=uri)[2] == []
    assert project(source=uri, upload_data=True)[2] == ['data.source="uploaded/data.source/shared"']
    _, _, settings = project(source=str(tmp_path / "shared"), upload_data=True)
    assert settings == ['data.source="uploaded/data.source/shared"']


def test_images_go_to_the_bucket_that_is_the_storage(project, monkeypatch):
    sent = []
    monkeypatch.setattr(packages, "upload", sent.append)
    make_images("images")
    names, _, settings = project(source="images", upload_data=True, storage="s3://bucket/team")
    ((first, path), _) = sorted(sent[0].items())
    assert path == Path.cwd() / "images" / "cat" / "1.png"
    uri = first.removesuffix("/cat/1.png")
    assert settings == [f'data.source="{uri}"']
    assert uri.startswith("s3://bucket/team/.data/images-")
    assert not [name for name in names if name.endswith(".png")]
    (Path("images") / "cat" / "3.png").write_bytes(b"another")
    project(source="images", upload_data=True, storage="s3://bucket/team")
    assert not [name for name in sent[1] if name.startswith(uri)], "other images have another place"
    Path("images/index.csv").write_text("path,label\ncat/1.png,cat\ndog/2.png,dog\n")
    _, _, (setting,) = project(source="images/index.csv", upload_data=True, storage="s3://bucket/team")
    table = setting.removeprefix('data.source="').removesuffix('"')
    assert sorted(name.removeprefix(table.removesuffix("index.csv")) for name in sent[2]) == [
        "cat/1.png", "dog/2.png", "index.csv",
    ]  # fmt: skip


def test_weights_go_along_too(project):
    for name in ("config.json", "model.safetensors"):
        Path("../weights").mkdir(exist_ok=True)
        (Path("../weights") / name).write_text("{}")
    encoder = {"type": "auto", "pretrained_model_name_or_path": "../weights"}
    with pytest.raises(ConfigError, match=r"encoders.0.pretrained_model_name_or_path: '../weights' lies on this"):
        project(encoder=encoder)
    names, _, settings = project(encoder=encoder, upload_data=True)
    inside = "uploaded/encoders.0.pretrained_model_name_or_path/weights"
    assert settings == [f'encoders.0.pretrained_model_name_or_path="{inside}"']
    assert f"{inside}/model.safetensors" in names
    names, _, settings = project(encoder=encoder | {"use_pretrained": False}, upload_data=True)
    assert f"{inside}/config.json" in names, "random weights need their architecture"


def test_weights_go_to_the_bucket_too(project, monkeypatch):
    sent = []
    monkeypatch.setattr(packages, "upload", sent.append)
    Path("../weights").mkdir()
    Path("../weights/config.json").write_text("{}")
    encoder = {"type": "auto", "pretrained_model_name_or_path": "../weights"}
    names, _, (setting,) = project(encoder=encoder, upload_data=True, storage="s3://bucket/team")
    key, _, value = setting.partition("=")
    assert key == "encoders.0.pretrained_model_name_or_path"
    assert list(sent[0]) == [f"{json.loads(value)}/config.json"]
    assert not [name for name in names if "config.json" in name]


def test_what_is_not_there_is_said_here(project):
    with pytest.raises(ConfigError, match=r"data.source: .*/project/nothing: no such file or folder"):
        project(source="nothing")
    with pytest.raises(ConfigError, match=r"data.source: /nothing/here: no such file or folder"):
        project(source="/nothing/here", upload_data=True)


# Versions


def test_versions_are_those_of_the_constraints(tmp_path):
    found = dict(line.split("==") for line in requirements(REPOSITORY / "constraints.txt"))
    pinned = dict(
        line.lower().split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert {"torch", "transformers", "mlflow", "optuna", "pyarrow", "psycopg", "aiohttp-cors"} <= set(found)
    assert not {"ray", "raysweep", "pytest", "ruff", "moto"} & set(found)
    assert {name: value for name, value in found.items() if pinned.get(name, value) != value} == {}


def test_without_constraints_versions_are_the_ones_installed(tmp_path):
    (tmp_path / "c.txt").write_text("# none but\nTorch==1.2.3\n")
    found = dict(line.split("==") for line in requirements(tmp_path / "c.txt"))
    assert found["torch"] == "1.2.3"
    assert found["mlflow"] == version("mlflow")
    assert (
        dict(line.split("==") for line in requirements(tmp_path / "none"))["torch"]
        == version("torch").partition("+")[0]
    ), "which an index has"


def test_packing_needs_no_torch():
    code = """
        import sys
        from pathlib import Path
        from raysweep.cluster.package import requirements
        from raysweep import submit
        requirements(Path("none"))
        sys.exit(bool({"torch", "transformers", "mlflow", "optuna"} & set(sys.modules)))
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, env=os.environ).returncode == 0
