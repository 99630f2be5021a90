import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import raysweep
from raysweep.cluster import package as packages
from raysweep.cluster.package import build_package, requirements
from raysweep.cluster.packing_rules import follow_links, reason_of_name
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
    package = Path(raysweep.__file__).parent
    whole = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {name for name in whole if "__pycache__" not in name} <= names
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


SECRETS = """
    .netrc .env .env.local .env.production .kaggle/kaggle.json .config/gcloud/credentials.db .config/gh/hosts.yml
    .kube/config .docker/config.json .cache/huggingface/token .huggingface/token .git-credentials .aws/credentials
    .ssh/id_ed25519 .pgpass .npmrc .pypirc .vault-token .boto .terraform/terraform.tfstate .azure/accessTokens.json
    .gnupg/secring.gpg .bash_history .s3cfg .mlflow/credentials sub/.env sub/.hidden/file.txt id_rsa sub/id_ed25519
    id_rsa.bak server.pem tls.key SERVER.PEM a.p12 a.pfx release.jks passwords.kdbx credentials credentials.json
    gcp-credentials.json application_default_credentials.json service-account.json service-account-prod.json
    service_account.json client_secret_123.json raysweep-firebase-adminsdk-x.json kaggle.json kubeconfig
    prod.kubeconfig terraform.tfstate terraform.tfstate.backup prod.tfvars vault-token vault_password.txt prod.env
    netrc secrets.yaml secret.txt secrets/db.txt token hf_token hf_token.txt token.json auth_token rootkey.csv
    alice_accessKeys.csv api_key.txt deploy_key password.txt rclone.conf putty.ppk a.keytab a.gpg a.asc
    gha-creds-12.json aws_credentials.csv my-passwords.txt passwd kube_config.yaml .dockercfg dockerconfig.json a.der
    keys.txt keys.json keys.yaml key.txt auth.json oauth2.json client_id.json cookies.json pass.txt pwd.txt logins.json
    github_rsa deploy-rsa my_ed25519 bash_history s3cfg.txt aws_config rclone.conf.bak azureProfile.json kube.config
    group_vars/all/vault.yml docker-config.json google-services.json connection_string.txt github_pat.txt my.cnf
    azureauth.json deploy_ssh_key env prod.env.bak production.secrets.enc config/master.key MySecrets.YAML
"""  # names of files


@pytest.mark.parametrize("git", [True, False], ids=["in git", "without"])
def test_no_secret_is_packed(project, monkeypatch, tmp_path, git):
    """A canary in the environment, in hidden files and in key files is nowhere in the package."""
    canary = "canary-7f3a9c"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, canary)
    for name in SECRETS.split():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"secret = {canary}\n")
    Path("deploy.txt").write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{canary}\n-----END OPENSSH PRIVATE KEY-----\n")
    Path("robot.json").write_text(json.dumps({"private_key": f"-----BEGIN PRIVATE KEY-----\n{canary}\n"}))
    Path("linked.txt").symlink_to(".env")
    Path("linked").symlink_to(".aws")
    Path("outside.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "secret.txt").write_text(canary)
    if git:
        shutil.rmtree(".git")
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(
            ["git", "add", "-f", ".env", "id_rsa", "sub/.env"], check=True
        )  # tracked, and secret all the same
    names, _, _ = project()
    assert {"notes.txt", "src/kept.py", "experiments/x.yaml"} <= names
    package = zipfile.ZipFile(tmp_path / "package.zip")
    assert [name for name in names if canary.encode() in package.read(name)] == []
    assert canary.encode() not in (tmp_path / "package.zip").read_bytes()


TEXTS_WITH_KEYS = {
    "AWS": "Access key ID,Secret access key\nAKIA{0:A<16},x",
    "AWS settings": "aws_secret_access_key = {0:a<40}",
    "GitHub": "git clone https://ghp_{0:a<36}@github.com/x/y",
    "Hugging Face": 'login(token="hf_{0:a<34}")',
    "Google": '{{"type": "authorized_user", "refresh_token": "{0}"}}',
    "OpenAI": "export OPENAI_API_KEY=sk-proj-{0:a<48}",
    "Slack": "xoxb-{0:1<12}",
}


@pytest.mark.parametrize("kind", TEXTS_WITH_KEYS)
@pytest.mark.parametrize("name", ["notes.ipynb", "src/client.py", "my-project-a1b2.json", "data/new.csv"])
def test_a_file_with_a_token_in_its_text_is_not_packed(project, kind, name):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(TEXTS_WITH_KEYS[kind].format(""))
    names, _, _ = project()
    assert name not in names


@pytest.mark.parametrize(
    "text", ["ask-{0:a<60}", "sk-learn-and-other-libraries-that-are-good-for-images", "hf_hub_download(repo)", "ghp_"]
)
def test_words_that_begin_like_a_token_are_none(project, text):
    Path("notes.md").write_text(text.format(""))
    names, _, _ = project()
    assert "notes.md" in names


def test_an_ignored_file_is_told_although_a_longer_name_is_packed(project, tmp_path):
    project()
    Path("run.log").write_text("x")
    Path("run.log.md").write_text("x")
    names, said = packed_with(tmp_path)
    assert ("run.log.md" in names, "run.log" in names) == (True, False)
    assert re.search(r"named in .gitignore: .*\brun\.log\b(?!\.md)", said)


def test_many_files_and_links_take_a_moment():
    """Each of 20,000 links is looked up, and not compared with each of 20,000 files."""
    kept = [f"data/{number // 100}/{number}.png" for number in range(20_000)]
    start = time.monotonic()
    files, left_out = follow_links(Path.cwd(), (f"links/{number}" for number in range(20_000)), set(kept))
    assert (files, len(left_out)) == ({}, 20_000)
    assert time.monotonic() - start < 10


def test_what_a_sweep_needs_is_no_secret():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split()
    needed = [name for name in tracked if name.startswith(("raysweep/", "experiments/", "benchmarks/"))]
    weights = "model.safetensors config.json preprocessor_config.json tokenizer.json tokenizer_config.json vocab.txt"
    more_weights = "special_tokens_map.json added_tokens.json merges.txt model.safetensors.index.json"
    pictures = ["token/1.png", "secrets/key/id_rsa.jpg", "monkey/credentials.webp", "a/password.tif"]
    rest = ["monkey.csv", "keys.py", "environment.yml", "constraints.txt", "tokenize.py", "README.md", "Makefile"]
    names = [*needed, *weights.split(), *more_weights.split(), *pictures, *rest]
    left = {name: reason_of_name(name.split("/")) for name in names}
    assert {name: reason for name, reason in left.items() if reason} == {}


def packed_with(tmp_path, *include):
    said = []
    target = tmp_path / "package.zip"
    target.unlink(missing_ok=True)
    build_package(
        target, Path("experiments/x.yaml"), load_experiment("experiments/x.yaml"),
        upload_data=False, include=include, say=said.append,
    )  # fmt: skip
    return set(zipfile.ZipFile(target).namelist()), "\n".join(said)


def test_what_is_packed_and_what_is_not_is_listed(project, tmp_path):
    project(storage="runs")
    for number in range(30):
        Path(f"file-{number:02d}").write_bytes(bytes(100_000))
    for name in (".env", ".config/a/b", ".config/c", "id_rsa", "venv/bin/python", "bad\x1b[2J.key"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    Path("link").symlink_to("/etc/hostname")
    names, said = packed_with(tmp_path)
    lines = said.splitlines()
    own = [name for name in names if not name.startswith("raysweep/")]
    size = sum(entry.file_size for entry in zipfile.ZipFile(tmp_path / "package.zip").infolist())
    assert lines[0] == f"the package: {len(names)} files, {size / 1e6:.1f} MB before they are compressed"
    assert lines[1:21] == [f"  {name}" for name in sorted(own)[:20]]
    assert lines[21:] == [
        f"  and {len(own) - 20} more",
        f"  and raysweep itself, {len(names) - len(own)} files",
        "left out (--include PATH sends a file or folder all the same):",
        "  hidden: .config/, .env, .gitignore, src/.gitignore",
        "  links out of the folder: link",
        r"  may hold keys or passwords: 'bad\x1b[2J.key', id_rsa",
        "  named in .gitignore: big.log, runs/, src/secret.key",
        "  results, caches and environments: venv/",
    ]


def test_what_is_named_is_packed_all_the_same(project, tmp_path):
    project()
    names = (
        ".streamlit/config.toml",
        ".streamlit/secrets.toml",
        "settings/.env",
        "settings/a.txt",
        "settings/a.key",
        "id_rsa",
    )
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    packed, said = packed_with(tmp_path, ".streamlit", "settings/.env", "big.log", "./runs/../runs")
    assert {".streamlit/config.toml", "settings/.env", "settings/a.txt", "big.log", "runs/x/leaderboard.json"} <= packed
    assert not {".streamlit/secrets.toml", "settings/a.key", "id_rsa"} & packed
    assert "may hold keys or passwords: .streamlit/secrets.toml, id_rsa, settings/a.key" in said
    assert "runs" not in said.partition("left out")[2]
    assert "id_rsa" in packed_with(tmp_path, "id_rsa")[0]


@pytest.mark.parametrize(
    ("path", "message"), [("nothing", "no such file"), ("..", "outside"), (".", "outside"), ("/etc", "outside")]
)
def test_a_path_to_include_lies_in_the_working_directory(project, tmp_path, path, message):
    project()
    with pytest.raises(ConfigError, match=rf"--include: '{path}'.*{message}"):
        packed_with(tmp_path, path)


def test_a_link_within_the_folder_is_followed_to_what_is_packed(project, tmp_path):
    Path("also.txt").symlink_to("notes.txt")
    Path("also").symlink_to("src")
    Path("around").symlink_to(".")
    Path("left").symlink_to("runs")
    Path("broken").symlink_to("nowhere")
    project()
    names, said = packed_with(tmp_path)
    assert {"also.txt", "also/kept.py"} <= names
    assert not [name for name in names if name.startswith(("around", "left", "broken", "also/secret"))]
    assert "links to what is not packed: around, broken, left" in said


def test_a_link_in_the_data_leads_to_an_image_only(project, tmp_path):
    """Who wrote the data chose where its links lead."""
    make_images("images")
    make_images(tmp_path / ".cache" / "dataset")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("canary")
    (tmp_path / "plain.json").write_text("canary")
    for name, target in {
        "cat/3.png": ".aws/credentials",
        "cat/4.png": "plain.json",
        "cat/5.png": ".cache/dataset/cat/1.png",
    }.items():
        (Path("images") / name).symlink_to(tmp_path / target)
    for ignored in (".gitignore", "none"):
        if ignored == "none":
            Path(".gitignore").unlink()
        names, _, _ = project(source="images", upload_data=True)
        found = {name.rpartition("images/")[2] for name in names if name.endswith(".png")}
        assert found == {"cat/1.png", "dog/2.png", "cat/5.png"}


@pytest.mark.parametrize("name", ["diary.txt", "letter.md", "settings.yaml", "mail.html", "script.py"])
def test_a_link_in_the_data_leads_to_no_text_outside(project, tmp_path, name):
    make_images("data")
    (tmp_path / name).write_text("private")
    Path("data", name).symlink_to(tmp_path / name)
    names, _, _ = project(source="data")
    assert {"data/cat/1.png", "data/dog/2.png"} <= names
    assert f"data/{name}" not in names


def test_the_tables_of_a_folder_go_along_with_their_images(project):
    for split in ("train", "test"):
        (Path("images") / split).mkdir(parents=True)
        (Path("images") / split / "0.png").write_bytes(b"png")
        (Path("images") / split / "metadata.csv").write_text("file_name,label\n0.png,cat\n")
    (Path("images") / "notes.csv").write_text("a,b\n")
    names, _, _ = project(source="images", upload_data=True)
    found = {name.rpartition("images/")[2] for name in names if name.startswith("uploaded/")}
    assert found == {f"{split}/{name}" for split in ("train", "test") for name in ("0.png", "metadata.csv")}


def test_a_table_that_would_stay_out_is_told(project, tmp_path):
    """Without the table, the job would take the names of the folders for the classes."""
    for split in ("train", "test"):
        make_images(f"data/secrets/{split}")
        rows = ["file_name,label", "cat/1.png,tabby", "dog/2.png,beagle"]
        Path(f"data/secrets/{split}/metadata.csv").write_text("\n".join(rows))
    with pytest.raises(ConfigError, match=r"the sweep reads data/secrets/t.*/metadata.csv, which stays out .*may hold"):
        project(source="data")
    with pytest.raises(ConfigError, match="stays out of the package"):
        project(source="data", upload_data=True)
    names, _ = packed_with(tmp_path, "data/secrets")
    assert {"data/secrets/train/metadata.csv", "data/secrets/test/metadata.csv", "data/secrets/test/cat/1.png"} <= names
    names, _, _ = project(source="data/secrets")
    assert "data/secrets/train/metadata.csv" in names


def test_a_weights_folder_holds_no_keys(project, monkeypatch):
    for name in ("config.json", "model.safetensors", "credentials.json", ".env", "deploy.pem"):
        Path("../weights").mkdir(exist_ok=True)
        (Path("../weights") / name).write_text("{}")
    encoder = {"type": "auto", "pretrained_model_name_or_path": "../weights"}
    names, _, _ = project(encoder=encoder, upload_data=True)
    inside = "uploaded/encoders.0.pretrained_model_name_or_path/weights"
    assert {name for name in names if name.startswith("uploaded/")} == {
        f"{inside}/config.json",
        f"{inside}/model.safetensors",
    }
    sent = []
    monkeypatch.setattr(packages, "upload", sent.append)
    project(encoder=encoder, upload_data=True, storage="s3://bucket/team")
    assert sorted(uri.rpartition("/")[2] for uri in sent[0]) == ["config.json", "model.safetensors"]


def test_weights_of_the_hubs_cache_are_links_and_go_along(project, tmp_path):
    cache = tmp_path / ".cache" / "huggingface" / "hub" / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "f00").mkdir(parents=True)
    Path("weights").mkdir()
    for name, digest in {"config.json": 40 * "a", "model.safetensors": 64 * "b"}.items():
        (cache / "blobs" / digest).write_text("{}")
        (cache / "snapshots" / "f00" / name).symlink_to(f"../../blobs/{digest}")
        Path("weights", name).symlink_to(cache / "blobs" / digest)
    (cache / "blobs" / "token").write_text("canary")
    Path("weights/vocab").symlink_to(cache / "blobs" / "token")
    for folder in (str(cache / "snapshots" / "f00"), "weights"):
        encoder = {"type": "auto", "pretrained_model_name_or_path": folder}
        names, _, _ = project(encoder=encoder, upload_data=True)
        found = {name.rpartition("/")[2] for name in names if Path(folder).name in name.split("/")}
        assert found == {"config.json", "model.safetensors"}


def test_data_in_a_hidden_folder_is_packed_because_it_is_named(project):
    make_images(".data/pictures")
    names, _, settings = project(source=".data/pictures")
    assert ".data/pictures/cat/1.png" in names
    assert settings == []


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


def test_a_table_with_its_images_in_a_folder_of_their_own(project):
    make_images("images")
    text = "path,label\n1,cat\n"
    Path("images/index.csv").write_bytes(text.encode("utf-16"))
    keys = {"image_folder": "cat", "image_suffix": ".png"}
    names, _, _ = project(upload_data=True, data={"source": "images/index.csv", **keys})
    assert {"uploaded/data.source/images/index.csv", "uploaded/data.source/images/cat/1.png"} <= names
    keys["image_folder"] = str(Path.cwd() / "images" / "cat")
    with pytest.raises(ConfigError, match=r"data.image_folder: /.* lies on this machine alone; accepted with --upload"):
        project(upload_data=True, data={"source": "images/index.csv", **keys})


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
