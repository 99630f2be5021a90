import json
import os
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from raysweep import package as packages
from raysweep.errors import ConfigError
from raysweep.experiment.config import load_experiment
from raysweep.package import build_package, requirements

REPOSITORY = Path(__file__).resolve().parents[1]


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
    monkeypatch.setattr(packages, "LIMIT", 1000)
    with pytest.raises(ConfigError, match=r"makes a package of .* MiB, Ray takes .*: leave data out of it"):
        project()


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
    assert settings == ["data.source=uploaded/data.source/images"]
    assert {"uploaded/data.source/images/cat/1.png", "uploaded/data.source/images/dog/2.png"} <= names


def test_a_table_goes_along_with_the_images_beside_it(project):
    make_images("images")
    Path("images/index.csv").write_text("path,label\ncat/1.png,cat\n")
    names, _, settings = project(source="images/index.csv", upload_data=True)
    assert settings == ["data.source=uploaded/data.source/images/index.csv"]
    assert {"uploaded/data.source/images/index.csv", "uploaded/data.source/images/cat/1.png"} <= names


def test_an_absolute_path_may_be_one_that_all_nodes_share(project, tmp_path):
    make_images(tmp_path / "shared")
    names, _, settings = project(source=str(tmp_path / "shared"))
    assert (settings, [name for name in names if name.startswith("uploaded")]) == ([], [])
    _, _, settings = project(source=str(tmp_path / "shared"), upload_data=True)
    assert settings == ["data.source=uploaded/data.source/shared"]


def test_images_go_to_the_bucket_that_is_the_storage(project, monkeypatch):
    sent = []
    monkeypatch.setattr(packages, "upload", lambda folder, uri: sent.append((folder, uri)))
    make_images("images")
    names, _, settings = project(source="images", upload_data=True, storage="s3://bucket/team")
    ((folder, uri),) = sent
    assert folder == Path.cwd() / "images"
    assert settings == [f"data.source={uri}"]
    assert uri.startswith("s3://bucket/team/.data/images-")
    assert not [name for name in names if name.endswith(".png")]
    (Path("images") / "cat" / "3.png").write_bytes(b"another")
    project(source="images", upload_data=True, storage="s3://bucket/team")
    assert sent[1][1] != uri, "other images have another place"


def test_weights_go_along_too(project):
    for name in ("config.json", "model.safetensors"):
        Path("../weights").mkdir(exist_ok=True)
        (Path("../weights") / name).write_text("{}")
    encoder = {"type": "auto", "pretrained_model_name_or_path": "../weights"}
    with pytest.raises(ConfigError, match=r"encoders.0.pretrained_model_name_or_path: '../weights' lies on this"):
        project(encoder=encoder)
    names, _, settings = project(encoder=encoder, upload_data=True)
    inside = "uploaded/encoders.0.pretrained_model_name_or_path/weights"
    assert settings == [f"encoders.0.pretrained_model_name_or_path={inside}"]
    assert f"{inside}/model.safetensors" in names


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
    assert dict(line.split("==") for line in requirements(tmp_path / "none"))["torch"] == version("torch")


def test_packing_needs_no_torch():
    code = """
        import sys
        from pathlib import Path
        from raysweep.package import requirements
        from raysweep import submit
        requirements(Path("none"))
        sys.exit(bool({"torch", "transformers", "mlflow", "optuna"} & set(sys.modules)))
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, env=os.environ).returncode == 0
