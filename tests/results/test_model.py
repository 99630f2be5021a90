import io
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from raysweep.encoders.base import EncoderSpec
from raysweep.encoders.build import build_encoder, encoder_from_spec
from raysweep.encoders.head import Classifier, Head
from raysweep.errors import DataError, EncoderError, RaysweepError
from raysweep.images.decode import DecodeOptions, decode_image
from raysweep.images.pixel_depth import WhiteLevels
from raysweep.results.model import Model, PyfuncModel, export_model, is_intact, load_model, remove_unfinished
from raysweep.training.loop import predict_logits

MOBILENET = Path(__file__).resolve().parents[2].parent / "shared" / "weights" / "mobilenet_v2"
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
BLOCKS = {
    "stacked_cnn": {"type": "stacked_cnn", "config": {"channels": [8, 12]}, "image_size": 32},
    "dinov2": {"type": "dinov2", "use_pretrained": False, "config": TINY, "image_size": 32},
    "clip": {"type": "clip", "use_pretrained": False, "config": {**TINY, "intermediate_size": 32}, "image_size": 32},
    "siglip": {"type": "siglip", "use_pretrained": False, "config": {**TINY, "intermediate_size": 32},
               "image_size": 32},
    "mobilenet_v2": {"type": "auto", "pretrained_model_name_or_path": str(MOBILENET)},
}  # fmt: skip
CLASSES = ("angular leaf spot", "bean/rust", "healthy: ü")


def make_classifier(kind="stacked_cnn", source=None, normalize="standardize", num_classes=3):
    """A classifier whose every tensor, of the head and its normalisation too, is unlike its initial value."""
    encoder = build_encoder(BLOCKS[kind], seed=0)
    source = source or next(iter(encoder.sources))
    head = Head(encoder.num_features(source), num_classes, normalize)
    generator = torch.Generator().manual_seed(0)
    for tensor in head.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return Classifier(encoder, head, source).eval()


def image_bytes(number=0, size=(61, 47), kind="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def exported(tmp_path):
    export_model(tmp_path / "model", make_classifier(), CLASSES, {"study": "s"})
    return tmp_path / "model"


def assert_equal_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_loaded_model_gives_the_logits_it_gave_before(kind, tmp_path):
    if kind == "mobilenet_v2" and not MOBILENET.exists():
        pytest.skip(f"no weights at {MOBILENET}")
    classifier = make_classifier(kind)
    export_model(tmp_path / kind, classifier, CLASSES, {})
    model = load_model(tmp_path / kind)
    preprocessing = classifier.encoder.preprocessing
    images = [image_bytes(number, kind="JPEG") for number in range(2)]
    pixels = [preprocessing.resize_for_training(decode_image(image, preprocessing.min_side)) for image in images]
    expected = predict_logits(classifier, torch.from_numpy(np.stack(pixels)))
    # Equal weights, but without gradients torch takes other kernels on some CPUs: SigLIP's pooler differs by 3e-6.
    assert_equal_weights(model.classifier, classifier)
    found = model.logits([model.preprocess(image) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0
    assert model.labels == CLASSES
    assert not model.classifier.training
    assert not any(parameter.requires_grad for parameter in model.classifier.parameters())


@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_the_feature_source_and_normalisation_are_kept(normalize, tmp_path):
    classifier = make_classifier("dinov2", "cls+mean", normalize)
    export_model(tmp_path / "model", classifier, CLASSES, {})
    model = load_model(tmp_path / "model")
    assert (model.classifier.source, model.classifier.head.normalize) == ("cls+mean", normalize)
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model.classifier(images), classifier(images))


@pytest.mark.process
def test_a_moved_model_loads_in_a_process_of_its_own_with_no_hub(tmp_path):
    export_model(tmp_path / "model", make_classifier("dinov2"), CLASSES, {})
    moved = shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    code = (
        "import socket, sys; socket.socket.connect = None\n"
        "from pathlib import Path; from raysweep.results.model import load_model\n"
        "model = load_model(Path(sys.argv[1]))\n"
        "image = model.preprocess(Path(sys.argv[2]).read_bytes())\n"
        "print(model.logits([image]).tolist(), 'ray' in sys.modules)"
    )
    (tmp_path / "image.png").write_bytes(image_bytes())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    command = [sys.executable, "-c", code, str(moved), str(tmp_path / "image.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    model = load_model(moved)
    logits = model.logits([model.preprocess(image_bytes())]).tolist()
    assert done.stdout.split("\n")[0] == f"{logits} False"


def test_many_images_are_predicted_in_order(exported):
    model = load_model(exported)
    pixels = [model.preprocess(image_bytes(number)) for number in range(35)]  # more than a batch
    probabilities = model.probabilities(pixels)
    assert probabilities.shape == (35, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    for number in (0, 31, 32, 34):
        np.testing.assert_allclose(model.probabilities([pixels[number]])[0], probabilities[number], atol=1e-5)
    assert model.probabilities([]).shape == (0, 3)


def test_an_export_replaces_an_older_one_whole(exported):
    (exported / "leftover.txt").write_text("of the older one")
    export_model(exported, make_classifier("dinov2"), CLASSES, {})
    assert sorted(path.name for path in exported.iterdir()) == ["model.json", "model.safetensors"]
    assert load_model(exported).classifier.encoder.spec.family == "dinov2"
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_an_export_that_fails_leaves_the_older_one(exported):
    before = (exported / "model.safetensors").read_bytes()
    with pytest.raises(TypeError):
        export_model(exported, make_classifier("dinov2"), CLASSES, {"not JSON": object()})
    assert (exported / "model.safetensors").read_bytes() == before
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_others_may_read_an_export(exported):
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044 for path in (exported, *exported.iterdir()))


def test_others_may_not_where_the_umask_says_so(tmp_path):
    before = os.umask(0o077)
    try:
        export_model(tmp_path / "model", make_classifier(), CLASSES, {})
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert (stat.S_IMODE((tmp_path / "model").stat().st_mode), modes) == (0o700, {0o600})


def test_an_export_says_where_it_comes_from(exported):
    description = json.loads((exported / "model.json").read_text())
    assert description["about"] == {"study": "s"}
    assert description["labels"] == list(CLASSES)
    spec = make_classifier().encoder.spec
    assert description["encoder"] == spec.to_dict()
    assert encoder_from_spec(EncoderSpec.from_dict(description["encoder"])).spec == spec


# Temperature


def test_a_temperature_divides_the_logits_and_changes_no_label(tmp_path):
    export_model(tmp_path / "model", make_classifier(), CLASSES, {}, temperature=2.5)
    model = load_model(tmp_path / "model")
    pixels = [model.preprocess(image_bytes(number)) for number in range(20)]
    logits = model.logits(pixels).double().numpy()
    expected = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum(1, keepdims=True)
    np.testing.assert_allclose(model.probabilities(pixels), expected, rtol=1e-6)
    assert np.array_equal(model.probabilities(pixels).argmax(1), logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 31.0])
def test_almost_equal_logits_keep_their_order(exported, monkeypatch, temperature):
    model = replace(load_model(exported), temperature=temperature)
    logits = torch.tensor([[0.01, 0.010000001, 0.0]])
    assert logits.argmax() == 1
    monkeypatch.setattr(Model, "logits", lambda *_: logits)
    assert model.probabilities([]).argmax() == 1


def test_a_model_of_an_earlier_version_has_temperature_one(exported):
    edit(exported, temperature=None)
    model = load_model(exported)
    pixels = [model.preprocess(image_bytes())]
    assert model.temperature == 1.0
    np.testing.assert_allclose(model.probabilities(pixels), model.logits(pixels).softmax(-1).numpy(), rtol=1e-6)


# Folders that are no models


def edit(folder, **changes):
    file = folder / "model.json"
    description = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in description.items() if value is not None}))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(exported, name):
    (exported / name).unlink()
    with pytest.raises(RaysweepError, match=r"not an exported model; expected a folder with model\.json and .*" + name):
        load_model(exported)


def test_neither_a_missing_folder_nor_a_file_is_a_model(exported):
    for path in (exported.parent / "nothing", exported / "model.safetensors"):
        with pytest.raises(RaysweepError, match=f"{path}: not an exported model"):
            load_model(path)


def part(folder, name, **changes):
    """Changes keys of a part of the description, such as `encoder`."""
    description = json.loads((folder / "model.json").read_text())
    edit(folder, **{name: {**description[name], **changes}})


def preprocessing(folder, **changes):
    description = json.loads((folder / "model.json").read_text())
    part(folder, "encoder", preprocessing={**description["encoder"]["preprocessing"], **changes})


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


TAMPERED = {
    "a byte of the weights": lambda folder: flip_a_byte(folder / "model.safetensors"),
    "another number": lambda folder: edit(folder, head={"num_features": 10**12, "num_classes": 3}),
    "a huge head": lambda folder: edit(
        folder, labels=["x"] * 10**6, head={"num_features": 10**6, "num_classes": 10**6}
    ),
    "huge channels": lambda folder: part(folder, "encoder", config={"channels": [10**6, 12]}),
    "very many stages": lambda folder: part(folder, "encoder", config={"channels": [8] * 10**6}),
    "channels of text": lambda folder: part(folder, "encoder", config={"channels": "many"}),
    "no channels": lambda folder: part(folder, "encoder", config={}),
    "a huge image": lambda folder: preprocessing(folder, resize_size=10**6),
    "an image of no size": lambda folder: preprocessing(folder, crop_size=0),
    "no resampling filter": lambda folder: preprocessing(folder, resample=77),
    "a mean of text": lambda folder: preprocessing(folder, mean=["a", "b", "c"]),
    "a deviation of zero": lambda folder: preprocessing(folder, std=[0, 0, 0]),
    "a scale that is no number": lambda folder: preprocessing(folder, rescale_factor=float("nan")),
    "an unknown key": lambda folder: preprocessing(folder, code="x"),
    "an unknown part": lambda folder: part(folder, "encoder", sources={"pooled": ["other"]}),
    "a part of no size": lambda folder: part(folder, "encoder", parts={"pooled": -1}),
    "temperature zero": lambda folder: edit(folder, temperature=0),
    "no temperature": lambda folder: edit(folder, temperature=float("nan")),
    "other features": lambda folder: edit(folder, features="other"),
    "labels of numbers": lambda folder: edit(folder, labels=[1, 2, 3]),
    "a label that is no text": lambda folder: edit(folder, labels=["\ud800", "b", "c"]),
    "labels in a string": lambda folder: edit(folder, labels="abc"),
    "no object": lambda folder: (folder / "model.json").write_text("null"),
    "nested without end": lambda folder: (folder / "model.json").write_text("[" * 10**5),
    "no UTF-8": lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe{}"),
    "images of an unknown kind": lambda folder: edit(folder, images={"x": 1}),
    "an encoder in a list": lambda folder: edit(folder, encoder=[]),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_model_that_was_changed_is_refused_with_its_folder(exported, kind):
    TAMPERED[kind](exported)
    with pytest.raises(RaysweepError, match=f"^{exported}: ") as raised:
        load_model(exported)
    assert len(str(raised.value)) < 600


def test_a_config_of_ten_million_layers_is_refused_at_once(tmp_path):
    export_model(tmp_path / "model", make_classifier("dinov2"), CLASSES, {})
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    config = description["encoder"]["config"]
    for changes in ({"num_hidden_layers": 10_000_000}, {"hidden_size": 10_000_000}):
        part(tmp_path / "model", "encoder", config={**config, **changes})
        with pytest.raises(RaysweepError, match="model: "):
            load_model(tmp_path / "model")


def test_a_pipe_is_not_waited_for(exported):
    for name in ("model.safetensors", "model.json"):
        (exported / name).unlink()
        os.mkfifo(exported / name)
        with pytest.raises(RaysweepError, match="not an exported model"):
            load_model(exported)


def test_a_model_of_an_earlier_version_has_no_checksum_and_is_read(exported):
    edit(exported, checksum=None)
    assert load_model(exported).labels == CLASSES
    assert is_intact(exported)


def test_damage_is_noticed_without_loading(exported):
    assert is_intact(exported)
    for kind in ("a byte of the weights", "no object", "labels of numbers"):
        export_model(exported, make_classifier(), CLASSES, {})
        TAMPERED[kind](exported)
        assert not is_intact(exported)
    export_model(exported, make_classifier(), CLASSES, {})
    os.truncate(exported / "model.safetensors", 4000)
    assert not is_intact(exported)
    (exported / "model.safetensors").unlink()
    assert not is_intact(exported)
    assert not is_intact(exported / "nothing")


def test_what_killed_exports_left_is_removed_and_nothing_else(exported):
    models = exported.parent
    (models / ".model.a1b2c3d4").mkdir()
    (models / ".model.a1b2c3d4" / "model.safetensors").write_bytes(b"half")
    (models / ".other.0000_zzz").mkdir()
    remove_unfinished(models)
    assert [path.name for path in models.iterdir()] == ["model"]
    assert is_intact(exported)
    remove_unfinished(models / "nothing")


DAMAGE = {
    "truncated weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\0\0\0"),
    "half of the weights": lambda folder: os.truncate(folder / "model.safetensors", 4000),
    "no JSON": lambda folder: (folder / "model.json").write_text("{"),
    "a list": lambda folder: (folder / "model.json").write_text("[]"),
    "no labels": lambda folder: edit(folder, labels=None),
    "fewer labels": lambda folder: edit(folder, labels=["one"]),
    "no head": lambda folder: edit(folder, head=None),
    "another head": lambda folder: edit(folder, head={"num_features": 5, "num_classes": 3}),
    "no such normalisation": lambda folder: edit(
        folder, head={"num_features": 12, "num_classes": 3, "normalize": "odd"}
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model_is_named(exported, kind):
    DAMAGE[kind](exported)
    with pytest.raises(RaysweepError, match=f"{exported}: the exported model is damaged"):
        load_model(exported)


def test_another_format_is_refused(exported):
    edit(exported, format=99)
    with pytest.raises(RaysweepError, match=r"model\.json: format 99 is not one this raysweep reads; accepted: 1"):
        load_model(exported)


def test_an_encoder_of_another_transformers_is_refused_by_its_own_error(exported):
    spec = make_classifier("dinov2").encoder.spec.to_dict()
    edit(exported, encoder={**spec, "config": {**spec["config"], "model_type": "dinov9"}})
    with pytest.raises(EncoderError, match=f"{exported}: .*dinov9"):
        load_model(exported)


# The pyfunc


def test_a_frame_of_bytes_becomes_a_frame_of_labels(exported):
    model = load_model(exported)
    frame = PyfuncModel(model).predict(pd.DataFrame({"image": [image_bytes(0), image_bytes(1)]}))
    names = [f"probability_{name}" for name in CLASSES]
    assert list(frame.columns) == ["label", "probability", *names]
    expected = model.probabilities([model.preprocess(image_bytes(number)) for number in (0, 1)])
    np.testing.assert_array_equal(frame[names].to_numpy(), expected.astype(float))
    assert frame["label"].tolist() == [CLASSES[number] for number in expected.argmax(1)]
    assert frame["probability"].tolist() == expected.max(1).astype(float).tolist()
    assert len(PyfuncModel(model).predict(pd.DataFrame({"image": []}))) == 0


def test_an_undecodable_row_is_named(exported):
    with pytest.raises(DataError, match="row 1: not an image"):
        PyfuncModel(load_model(exported)).predict(pd.DataFrame({"image": [image_bytes(0), b"text"]}))


def test_a_model_decodes_images_as_those_it_was_trained_on(tmp_path):
    options = DecodeOptions(max_megapixels=60.0, whites=WhiteLevels.of_bits(12))
    export_model(tmp_path / "model", make_classifier(), CLASSES, {}, options)
    model = load_model(tmp_path / "model")
    assert model.decode_options == options
    buffer = io.BytesIO()
    Image.fromarray(np.full((70, 70), 4095, np.uint16)).save(buffer, "TIFF")
    assert (model.preprocess(buffer.getvalue()) == 255).all()
    export_model(tmp_path / "usual", make_classifier(), CLASSES, {})
    assert "images" not in json.loads((tmp_path / "usual" / "model.json").read_text())
    assert load_model(tmp_path / "usual").decode_options == DecodeOptions()
