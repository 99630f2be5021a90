import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from run_folder import make_row, make_run, make_test_rows, make_trials

from raysweep.report.page import render_page
from raysweep.report.report import write_report
from raysweep.report.run_files import read_run
from raysweep.results.sweep_record import read_record, write_record
from raysweep.storage.paths import write_json

VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Collects elements and texts, and checks that each element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.stack = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(paths):
    write_report(str(paths.root))
    return Page(paths.report_html.read_text())


def test_long_class_names_are_cut_in_the_confusion_matrix(tmp_path):
    name = "x" * 200
    page = Page(render_page(read_run(str(make_run(tmp_path, classes=(name, "b")).root))))
    cells = [attributes for attributes in page.all("th") if attributes.get("title") == name]
    assert len(cells) == 2 * 2, "two studies, and a line and a column in the matrix of each"
    assert "x" * 23 + "…" in page.texts


def test_near_copies_and_their_labels_are_told(tmp_path):
    paths = make_run(tmp_path)
    assert "near copy" not in page_of(paths).text
    pair = {"image": "t/<b>.png", "train_image": "r/b.png"}
    one, other = ({"image": f"{name}.png", "split": "train", "class": name} for name in ("cat", "dog"))
    found = {"leaks": {"test": [pair, pair], "validation": []}, "conflicts": [[one, other]]}
    write_json(paths.near_copies, found)
    text = page_of(paths).text
    assert "2 test images have a near copy in train, such as t/<b>.png and r/b.png." in text
    assert "Near copies have different labels, 1 time, such as cat.png (cat) and dog.png (dog)." in text
    assert "validation images have a near copy" not in text
    assert "Left out" not in text


def test_the_first_screen_answers(tmp_path):
    page = page_of(make_run(tmp_path))
    text = page.text[: page.text.index("Accuracy against cost")]
    assert "cnn fine_tune is first on validation; its test accuracy is 0.800 [0.610, 0.920]" in text
    assert "dino linear_probe (0.800) cannot be told from it on 30 test images" in text
    assert "took 10.0 s to train instead of 1 min 00 s" in text
    assert "models/dino-linear_probe IMAGE" in text
    assert text.index("may be best") < text.index("recommended")


def test_a_study_shows_its_trials_classes_and_mistakes(tmp_path):
    page = page_of(make_run(tmp_path))
    labels = [attributes["aria-label"] for attributes in page.all("div") if attributes.get("role") == "img"]
    assert any(
        "8 trials; the chosen one, trial 3 with lr 0.01, 4 epochs, has val/accuracy 0.900" in one for one in labels
    )
    assert any(one.startswith("Learning curves, val/loss: val/loss after each epoch of 8 trials") for one in labels)
    assert "Failed: 1." in page.text
    assert "6 of 30 wrong" in page.text
    # The pairs of classes, and the images, the most confident first.
    assert "ant bee 2 20.0 %" in page.text
    pictures = page.all("img")
    assert [picture["title"].split("/")[-1] for picture in pictures[:6]] == [f"{n}.png" for n in range(29, 23, -1)]
    assert pictures[0]["alt"].endswith("29.png: cat, taken for ant")
    assert pictures[0]["src"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}-->"])
def test_text_of_the_data_is_only_text(tmp_path, text):
    name = text.replace("/", "\\")
    paths = make_run(tmp_path, classes=(text, "bee", "$x^2$"), first_name=f"{name}.png")
    page = page_of(paths)
    assert [tag for tag, _ in page.elements if tag in ("script", "iframe", "object", "link", "base")] == []
    assert not [attributes for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert {attributes["src"].split(",")[0] for attributes in page.all("img")} == {"data:image/jpeg;base64"}
    assert text in page.text
    assert "$x^2$" in page.text
    assert "<script" not in paths.report_md.read_text()
    assert "<img" not in paths.report_md.read_text()


def test_a_path_with_a_script_is_only_text(tmp_path):
    tested = make_test_rows()
    tested.predicted[0] = 1
    tested.probabilities[0] = [0.01, 0.98, 0.01]
    page = page_of(make_run(tmp_path, tested=tested, first_name="<script>alert(1)<\\script>.png"))
    assert page.all("img")[0]["alt"] == "images/<script>alert(1)<\\script>.png: ant, taken for bee"
    assert page.all("script") == []


def test_the_page_needs_no_other_file(tmp_path):
    page = page_of(make_run(tmp_path))
    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    policy = page.all("meta")[-1]
    assert policy["content"].startswith("default-src 'none'")


def test_it_can_be_heard_and_used_without_a_mouse(tmp_path):
    page = page_of(make_run(tmp_path))
    assert page.all("html") == [{"lang": "en"}]
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes.get("aria-hidden") == "true" for attributes in page.all("svg"))
    images = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len(images) == len(page.all("svg"))
    assert all(len(attributes["aria-label"]) > 20 for attributes in images)
    scrolling = [attributes for attributes in page.all("div") if "scroll" in attributes.get("class", "")]
    assert all(
        attributes["tabindex"] == "0" and attributes.keys() & {"aria-label", "aria-labelledby"}
        for attributes in scrolling
    )
    assert all(attributes.get("scope") for attributes in page.all("th"))


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_stands_out_in_light_and_in_dark(tmp_path, theme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 for text."""
    themes = re.findall(r":root \{(.*?)\}", render_page(read_run(str(make_run(tmp_path).root))), re.DOTALL)
    assert len(themes) == 2
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", themes[theme]))
    pairs = [(text, back) for text in ("ink", "muted", "accent", "good", "warn") for back in ("paper", "band")]
    pairs += [("warn", "warn-band"), ("ink", "good-band"), ("muted", "good-band"), ("paper", "good")]
    for text, back in pairs:
        light, dark = sorted((luminance(colours[text]), luminance(colours[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, back)


def test_many_classes_are_a_picture_and_pairs(tmp_path):
    classes = tuple(f"class {number}" for number in range(40))
    paths = make_run(tmp_path, classes=classes, num_test=80, trials=[])
    page = page_of(paths)
    assert "class 24 class 25 1 50.0 %" in page.text
    assert not [attributes for attributes in page.all("table") if attributes.get("class") == "confusion"]
    assert any(one.get("aria-label", "").startswith("Confusion matrix") for one in page.all("div"))


def test_a_sweep_of_an_earlier_version_has_a_shorter_report(tmp_path):
    paths = make_run(tmp_path)
    for path in (paths.sweep_record, paths.trials, paths.predictions, paths.thumbnails):
        path.unlink()
    page = page_of(paths)
    assert "cnn fine_tune is first on validation" in page.text
    assert "predictions.parquet (not there)" in page.text
    assert page.all("img") == []


def test_a_damaged_file_is_said_and_left_out(tmp_path):
    paths = make_run(tmp_path)
    paths.predictions.write_bytes(b"PAR1")
    page = page_of(paths)
    assert "Left out, because these files are missing" in page.text
    assert "predictions.parquet" in page.text
    assert "Learning curves" in page.text


def test_few_shot_rows_have_a_section_of_their_own(tmp_path):
    rows = [make_row(), make_row("dino-linear_probe", shots=5, num_seeds=5)]
    page = page_of(make_run(tmp_path, rows=rows))
    assert "5 images a class" in page.text
    assert "the mean of 5 draws" in page.text
    assert [one["colspan"] for one in page.all("th") if "colspan" in one] == ["8", "8"]


def test_accuracy_by_shots_is_drawn_with_its_intervals(tmp_path):
    shots = [("dino-linear_probe", 5, 0.65), ("dino-linear_probe-25shot", 25, 0.7), ("dino-knn", 5, 0.5)]
    rows = [
        make_row(name.removesuffix("-25shot"), shots=number, test_accuracy=accuracy) for name, number, accuracy in shots
    ]
    page = page_of(make_run(tmp_path, rows=[make_row(), *rows]))
    labels = [attributes["aria-label"] for attributes in page.all("div") if attributes.get("role") == "img"]
    (label,) = [label for label in labels if label.startswith("Accuracy by images a class")]
    assert label.endswith("dino linear_probe: 0.650 [0.610, 0.920] with 5, 0.700 [0.610, 0.920] with 25")


def test_trials_without_a_learning_rate_or_epochs_are_drawn_as_they_can_be(tmp_path):
    trials = [
        one.__class__(one.study, one.number, one.state, {"epochs": 4}, one.metrics, {}, -1, 1.0)
        for one in make_trials()
    ]
    page = page_of(make_run(tmp_path, trials=trials))
    labels = [attributes["aria-label"] for attributes in page.all("div") if attributes.get("role") == "img"]
    assert not [one for one in labels if one.startswith(("Every trial", "Learning curves"))]


def test_the_ring_is_on_the_trial_that_was_chosen(tmp_path):
    """Trials are chosen by loss: of two with one setting, the one with the lower loss."""
    trials = make_trials()
    trials += [replace(trials[3], number=20, metrics={"val/accuracy": 0.8, "val/loss": 0.05})]
    page = page_of(make_run(tmp_path, trials=trials))
    (label,) = [one["aria-label"] for one in page.all("div") if one.get("aria-label", "").startswith("Every trial")]
    assert "the chosen one, trial 20 with lr 0.01, 4 epochs, has val/accuracy 0.800" in label


def test_what_matters_is_said(tmp_path):
    paths = make_run(tmp_path)
    shares = {"cnn-fine_tune": {"epochs": 0.25, "learning_rate": 0.746, "features": 0.004}}
    write_record(paths.sweep_record, replace(read_record(paths.sweep_record), importances=shares))
    assert "among the best: learning_rate 75 %, epochs 25 % (PED-ANOVA)" in page_of(paths).text
