import json

import pytest
import torch
from PIL import Image

from raysweep import __main__, predict
from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.results.model import export_model

CLASSES = [f"class {number}" for number in range(7)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model that prefers the later classes, and four images, one of which is none."""
    encoder = build_encoder({"type": "stacked_cnn", "config": {"channels": [4]}, "image_size": 16}, seed=0)
    head = Head(4, len(CLASSES))
    head.bias.data = 0.5 * torch.arange(len(CLASSES)).float()
    export_model(tmp_path / "model", Classifier(encoder, head, "pooled"), CLASSES, {})
    for number, name in enumerate(["one.png", "two words.jpg", "three.webp"]):
        Image.new("RGB", (30, 20), (80 * number, 10, 200)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_json_holds_every_class_of_every_image(folder, capsys):
    assert predict.main(["model", "one.png", "two words.jpg", "three.webp", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [entry["image"] for entry in found] == ["one.png", "two words.jpg", "three.webp"]
    assert err == ""
    for entry in found:
        assert list(entry["probabilities"]) == CLASSES
        assert sum(entry["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert entry["label"] == max(entry["probabilities"], key=entry["probabilities"].get) == "class 6"


def test_the_table_has_a_line_for_each_image(folder, capsys):
    assert predict.main(["model", "one.png", "two words.jpg"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("one.png        class 6  (class 6 0.")
    assert second.startswith("two words.jpg  class 6  (class 6 0.")
    # The five likeliest, in order.
    assert [first.index(f"class {number}") for number in (5, 4, 3, 2)] == sorted(
        first.index(f"class {number}") for number in (5, 4, 3, 2)
    )
    assert "class 1 " not in first


@pytest.mark.parametrize("form", ["table", "json"])
def test_an_unreadable_image_is_named_and_the_rest_predicted(folder, capsys, form, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    images = ["one.png", "broken.png", "missing.jpg", str(folder), "three.webp"]
    assert predict.main(["model", *images, "--format", form]) == 1
    out, err = capsys.readouterr()
    assert "one.png" in out
    assert "three.webp" in out
    assert "broken.png" not in out
    broken, missing, directory = err.splitlines()
    assert broken.startswith("error: broken.png: ")
    assert missing == "error: missing.jpg: No such file or directory"
    assert directory == f"error: {folder}: Is a directory"
    if form == "json":
        assert len(json.loads(out)) == 2


def test_nothing_readable_is_still_valid_json(folder, capsys):
    assert predict.main(["model", "broken.png", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_a_folder_that_is_no_model_is_a_clear_error(folder, capsys):
    assert predict.main(["nothing", "one.png"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: nothing: not an exported model")
    assert len(err.splitlines()) == 1


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        predict.main(["model"])
    assert stopped.value.code == 2
    assert "IMAGE" in capsys.readouterr().err


def test_the_console_script_hands_over(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["raysweep", "predict", "model", "one.png"])
    assert __main__.main() == 0
    assert "class 6" in capsys.readouterr().out
