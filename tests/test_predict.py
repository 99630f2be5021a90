import json
import os
import shutil
import subprocess
import sys

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
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("")
    os.mkfifo(folder / "pipe.png")
    images = ["one.png", "broken.png", "missing.jpg", "empty", "pipe.png", "three.webp"]
    assert predict.main(["model", *images, "--format", form]) == 1
    out, err = capsys.readouterr()
    assert "one.png" in out
    assert "three.webp" in out
    assert "broken.png" not in out
    note, empty, broken, missing, pipe = err.splitlines()
    assert note == "empty: 1 files that are no images left out: 1 .txt"
    assert empty.startswith("error: empty: no images in this folder; looked for .jpg .jpeg ")
    assert broken.startswith("error: broken.png: ")
    assert missing == "error: missing.jpg: No such file or directory"
    assert pipe == "error: pipe.png: not a regular file"
    if form == "json":
        assert len(json.loads(out)) == 2


def test_a_folder_stands_for_its_images(folder, capsys):
    (folder / "photos" / "of may").mkdir(parents=True)
    for source, target in [("one.png", "b.PNG"), ("two words.jpg", "of may/a.jfif"), ("three.webp", ".hidden.webp")]:
        shutil.copy(source, folder / "photos" / target)
    Image.new("L", (9, 9)).save(folder / "photos" / "of may" / "c.pgm")
    (folder / "photos" / "notes.txt").write_text("")
    assert predict.main(["model", "photos", "one.png", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    names = [entry["image"] for entry in json.loads(out)]
    assert names == ["photos/b.PNG", "photos/of may/a.jfif", "photos/of may/c.pgm", "one.png"]
    left_out, ignored = err.splitlines()
    assert left_out == "photos: 1 files that are no images left out: 1 .txt"
    assert ignored.startswith("photos: 1 hidden or system file ignored")


def test_names_and_labels_cannot_steer_the_terminal(folder, capsys):
    encoder = build_encoder({"type": "stacked_cnn", "config": {"channels": [4]}, "image_size": 16}, seed=0)
    labels = ["\x1b]0;title\x07", "safe\u202eexe\ncat"]
    export_model(folder / "odd", Classifier(encoder, Head(4, 2), "pooled"), labels, {})
    shutil.copy("one.png", "a\x1b[31m\nb.png")
    assert predict.main(["odd", "a\x1b[31m\nb.png", "c\x1b.png"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("a\\x1b[31m\\nb.png  \\x1b]0;title\\x07  (")
    assert "safe\\u202eexe\\ncat" in out
    assert len(out.splitlines()) == 1
    assert err == "error: c\\x1b.png: No such file or directory\n"


def test_names_that_lead_nowhere_are_named(folder, capsys):
    (folder / "more").mkdir()
    (folder / "more" / "self.png").symlink_to("self.png")
    shutil.copy("one.png", "more/one.png")
    too_long = 300 * "y"
    assert predict.main(["model", "more", too_long, "one.png/x"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("more/one.png  class 6")
    assert err.splitlines() == [
        "error: more/self.png: Too many levels of symbolic links",
        f"error: {too_long}: File name too long",
        "error: one.png/x: Not a directory",
    ]
    assert predict.main([too_long, "one.png"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {too_long}: the exported model is damaged")


def test_nobody_reads_the_output_any_more(folder):
    command = [sys.executable, "-m", "raysweep.predict", "model", "one.png"]
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written to (Broken pipe)\n")


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
