import importlib.util
import json
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import BitImageProcessor, BitImageProcessorPil, CLIPImageProcessor, LevitImageProcessor

from raysweep.encoders.base import weights_signature
from raysweep.encoders.build import build_encoder
from raysweep.encoders.families import FAMILIES
from raysweep.encoders.pretrained import PretrainedFiles, describe_error, find_pretrained
from raysweep.errors import EncoderError
from raysweep.storage.copies import upload


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub that refuses connections, and an empty cache: what a machine without network sees."""
    from huggingface_hub import constants, snapshot_download

    def unreachable(*arguments, **options):
        options |= {"endpoint": "http://127.0.0.1:9", "cache_dir": tmp_path / "cache"}
        return snapshot_download(*arguments, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_a_hub_id_without_network_fails_at_once_and_names_the_ways_out(offline, kind):
    name, started = FAMILIES[kind].default_weights, time.monotonic()
    with pytest.raises(EncoderError) as failure:
        build_encoder({"type": kind}, seed=0)
    assert time.monotonic() - started < 8
    message = str(failure.value)
    for expected in (name, "revision main", "Tried:", "a local folder", "HF_HOME", "use_pretrained: false"):
        assert expected in message


def test_a_prefilled_cache_needs_no_network(offline, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--some--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text('{"model_type": "vit"}')
    (snapshot / "model.safetensors").write_bytes(b"")
    pretrained = find_pretrained("some/model")
    assert (pretrained.revision, pretrained.name) == (commit, "some/model")
    assert pretrained.folder == snapshot


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(name):
    with pytest.raises(EncoderError, match="no such folder"):
        build_encoder({"type": "auto", "pretrained_model_name_or_path": name}, seed=0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "no config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "not an object"),
        ("{}", "names no model_type"),
        ('{"model_type": "vit"}', "no weights"),
    ],
)
def test_a_folder_without_pretrained_files_says_why(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(EncoderError, match=expected):
        find_pretrained(str(tmp_path))


def test_pretrained_files_may_be_in_a_bucket(bucket, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)
    Dinov2Model(config).save_pretrained(tmp_path / "saved")
    upload({f"{bucket}/weights/{path.name}": path for path in (tmp_path / "saved").iterdir()})
    described = find_pretrained(f"{bucket}/weights", with_weights=False)
    assert (described.config["hidden_size"], described.num_stored) == (16, 0)
    entry = {"type": "dinov2", "image_size": 32}
    fetched = build_encoder(entry | {"pretrained_model_name_or_path": f"{bucket}/weights"}, seed=0)
    saved = build_encoder(entry | {"pretrained_model_name_or_path": str(tmp_path / "saved")}, seed=0)
    assert weights_signature(fetched) == weights_signature(saved)
    with pytest.raises(EncoderError, match=r"pretrained_model_name_or_path: s3://.*/nothing: nothing is there"):
        find_pretrained(f"{bucket}/nothing")


PICKLED = ["pytorch_model.bin", "model.pt", "checkpoint.pth", "model.ckpt", "weights.pkl"]


@pytest.mark.parametrize("file", PICKLED)
@pytest.mark.parametrize("kind", ["auto", "dinov2"])
def test_pickled_weights_are_never_read(tmp_path, monkeypatch, file, kind):
    """Neither alone nor beside an index that names them."""

    def never(*_arguments, **_options):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr("torch.load", never)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    entry = {"type": kind, "pretrained_model_name_or_path": str(tmp_path)}
    with pytest.raises(EncoderError, match=f"its weights are pickled \\({file}\\), .*; accepted: \\*\\.safetensors"):
        build_encoder(entry, seed=0)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in (file, f"../{file}", "/etc/passwd", "../other/model.safetensors", None, 7):
        index = json.dumps({"metadata": {}, "weight_map": {"cls_token": name}})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(EncoderError, match=r"weight_map: .*; accepted: names of"):
            build_encoder(entry, seed=0)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(EncoderError, match="weights"):
        build_encoder(entry, seed=0)


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match="merge it into its base model first"):
        find_pretrained(str(tmp_path))


@pytest.mark.parametrize(("author", "converted"), [("SFconvertbot", True), ("someone", False)])
def test_weights_that_the_hub_has_converted_are_taken_from_its_own_bot_alone(monkeypatch, tmp_path, author, converted):
    asked = []

    def snapshot(_name, revision, **_options):
        asked.append(revision)
        folder = tmp_path / revision.replace("/", "-")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text('{"model_type": "clip"}')
        if revision != "main":
            save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
        return str(folder)

    request = SimpleNamespace(author=author, status="open", git_reference="refs/pr/5")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.get_repo_discussions", lambda *_arguments, **_options: [request])
    if converted:
        assert find_pretrained("some/model").folder.name == "refs-pr-5"
    else:
        with pytest.raises(EncoderError, match="no weights in"):
            find_pretrained("some/model")
        assert asked == ["main"]


def test_a_folder_without_weights_in_an_exact_revision_is_not_replaced_by_another(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_arguments, **_options: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.get_repo_discussions", lambda *_arguments, **_options: 1 / 0)
    with pytest.raises(EncoderError, match="no weights in"):
        find_pretrained("some/model", "v1.0")


def test_the_whole_message_of_another_library_is_told():
    error = ImportError("one\n  two\n\nthree  " + "x" * 3_000)
    assert describe_error(error).startswith("ImportError: one two three xxx")
    assert describe_error(error).endswith("x ... (3,014 characters)")
    assert describe_error(ValueError()) == "ValueError"


def test_a_processor_that_needs_torchvision_names_the_ways_out(tmp_path):
    """DINOv3's image processor exists for torchvision only."""
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is here")
    values = BitImageProcessorPil(do_center_crop=False, size={"height": 20, "width": 20}).to_dict()
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(values | {"image_processor_type": "DINOv3ViTImageProcessorFast"}))
    pretrained = PretrainedFiles(name="mine", revision=None, folder=tmp_path, config={})
    with pytest.raises(EncoderError) as failure:
        pretrained.preprocessing()
    for expected in ("requires the Torchvision library", "restart your runtime", "install torchvision", str(file)):
        assert expected in str(failure.value)
    file.write_text(json.dumps(values | {"image_processor_type": "ViTImageProcessor"}))  # the other way out
    assert pretrained.preprocessing().resize_size == (20, 20)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 10**9, "width": 10**9}, "do_center_crop": False},
        {"size": {"shortest_edge": "wide"}},
        {"size": [7]},
        {"size": {"shortest_edge": -5}},
        {"crop_size": 0},
        {"crop_size": {"height": 10**9, "width": 10**9}},
        {"image_mean": "grey"},
        {"image_mean": [float("nan"), 0, 0]},
        {"image_std": [0.0, 0.0, 0.0]},
        {"image_std": {"a": 1}},
        {"resample": 99},
        {"resample": "sharp"},
        {"rescale_factor": "much"},
        {"image_processor_type": 5},
        {"image_processor_type": None, "auto_map": {"AutoImageProcessor": "evil.Evil"}},
    ],
)
def test_a_tampered_processor_is_an_encoder_error(tmp_path, change):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(BitImageProcessorPil().to_dict() | change))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with pytest.raises(EncoderError, match="mine: "):
        PretrainedFiles(name="mine", revision=None, folder=tmp_path, config={}).preprocessing()


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\x00"])
def test_a_garbled_processor_is_an_encoder_error(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(EncoderError, match="mine: "):
        PretrainedFiles(name="mine", revision=None, folder=tmp_path, config={}).preprocessing()


def test_auto_needs_a_name():
    with pytest.raises(EncoderError, match="pretrained_model_name_or_path"):
        build_encoder({"type": "auto"}, seed=0)


def pretrained_with(folder, processor):
    processor.save_pretrained(folder)
    return PretrainedFiles(name="mine", revision=None, folder=folder, config={})


def test_the_processor_file_is_read(tmp_path):
    processor = BitImageProcessor(size={"shortest_edge": 300}, crop_size={"height": 280, "width": 280})
    preprocessing = pretrained_with(tmp_path, processor).preprocessing()
    assert (preprocessing.resize_size, preprocessing.crop_size) == (300, 280)


def test_the_oldest_processor_files_are_read(tmp_path):
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    pretrained = PretrainedFiles(name="mine", revision=None, folder=tmp_path, config={})
    assert pretrained.preprocessing() == FAMILIES["clip"].preprocessing


def test_a_processor_inside_a_combined_file_is_read(tmp_path):
    CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=96).save_pretrained(tmp_path)
    alone = tmp_path / "preprocessor_config.json"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(alone.read_text())}))
    alone.unlink()
    pretrained = PretrainedFiles(name="mine", revision=None, folder=tmp_path, config={})
    assert pretrained.preprocessing().crop_size == 96


def test_a_processor_that_does_more_than_it_says_is_refused(tmp_path):
    with pytest.raises(EncoderError, match="LevitImageProcessor"):
        pretrained_with(tmp_path, LevitImageProcessor()).preprocessing()


def test_without_a_processor_file_there_is_no_preprocessing(tmp_path):
    assert PretrainedFiles(name="mine", revision=None, folder=tmp_path, config={}).preprocessing() is None
