import json
import time

import pytest
from transformers import BitImageProcessor, CLIPImageProcessor, LevitImageProcessor

from raysweep.encoders.base import weights_signature
from raysweep.encoders.build import build_encoder
from raysweep.encoders.families import FAMILIES
from raysweep.encoders.pretrained import PretrainedFiles, find_pretrained
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
    assert pretrained.has_safetensors


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
    assert (described.config["hidden_size"], described.has_safetensors) == (16, False)
    entry = {"type": "dinov2", "image_size": 32}
    fetched = build_encoder(entry | {"pretrained_model_name_or_path": f"{bucket}/weights"}, seed=0)
    saved = build_encoder(entry | {"pretrained_model_name_or_path": str(tmp_path / "saved")}, seed=0)
    assert weights_signature(fetched) == weights_signature(saved)
    with pytest.raises(EncoderError, match=r"pretrained_model_name_or_path: s3://.*/nothing: nothing is there"):
        find_pretrained(f"{bucket}/nothing")


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
