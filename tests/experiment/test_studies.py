import pickle

import pytest

from raysweep.experiment.modes import MODES
from raysweep.experiment.studies import (
    BASELINES,
    BaselineConfig,
    EncoderConfig,
    RowConfig,
    StudyConfig,
    list_baselines,
    list_studies,
    mode_problems,
)


def encoder(family="dinov2", **keys):
    return EncoderConfig(type=family, **keys)


def names(encoders, modes=None, shots=("all",)):
    return [study.name for study in list_studies(encoders, modes, shots)]


def test_default_weights_by_family():
    assert encoder("clip").pretrained_model_name_or_path == "openai/clip-vit-base-patch32"
    assert encoder("clip").use_pretrained is True
    assert encoder("stacked_cnn").pretrained_model_name_or_path is None
    assert encoder("stacked_cnn").use_pretrained is False


@pytest.mark.parametrize(
    ("keys", "modes", "expected"),
    [
        ({"family": "stacked_cnn"}, ["linear_probe"], ("from_scratch",)),
        ({}, None, ("linear_probe", "fine_tune")),
        ({}, ["fine_tune", "linear_probe", "from_scratch"], ("linear_probe", "fine_tune")),
        ({}, ["from_scratch"], ()),
        ({"use_pretrained": False}, None, ("from_scratch",)),
        ({"use_pretrained": False}, ["fine_tune", "linear_probe"], ("linear_probe", "fine_tune")),
        ({"use_pretrained": False, "trainable": True}, ["linear_probe"], ("from_scratch",)),
        ({"trainable": True}, ["linear_probe"], ("fine_tune",)),
        ({"trainable": False}, ["fine_tune"], ("linear_probe",)),
    ],
)
def test_modes_of_an_encoder(keys, modes, expected):
    assert encoder(**keys).modes(modes) == tuple(MODES[name] for name in expected)


def test_studies_run_by_shots_then_encoder_with_probes_first():
    assert names([encoder(), encoder("stacked_cnn")], ["fine_tune", "linear_probe"], (5, "all")) == [
        "dinov2-linear_probe-5shot",
        "dinov2-fine_tune-5shot",
        "stacked_cnn-from_scratch-5shot",
        "dinov2-linear_probe",
        "dinov2-fine_tune",
        "stacked_cnn-from_scratch",
    ]


def test_entries_that_differ_only_in_training_are_one_encoder():
    tuned, probed = encoder(trainable=True), encoder(trainable=False)
    studies = list_studies([tuned, encoder("clip", trainable=False), probed], None, ("all",))
    assert [study.name for study in studies] == ["dinov2-linear_probe", "dinov2-fine_tune", "clip-linear_probe"]
    assert studies[0].encoder == probed
    assert studies[1].encoder == tuned


def test_encoders_of_one_type_are_named_after_their_weights():
    encoders = [
        encoder(),
        encoder(pretrained_model_name_or_path="facebook/dinov2-small"),
        encoder(image_size=518),
        encoder(use_pretrained=False),
        encoder("auto", pretrained_model_name_or_path="../weights/mobilenet v2/"),
    ]
    found = list_studies(encoders, ["linear_probe"], ("all",))
    assert [study.encoder_name for study in found] == [
        "dinov2-base",
        "dinov2-small",
        "dinov2-base-2",
        "dinov2",
        "mobilenet-v2",
    ]


def test_mode_problems_name_the_entry():
    problems = mode_problems([encoder(), encoder("clip"), encoder("clip", trainable=True)], ["fine_tune"])
    assert [path for path, _ in problems] == [(2,)]
    assert "encoders.1" in problems[0][1]
    (path, message), *others = mode_problems([encoder()], ["from_scratch"])
    assert path == (0,)
    assert not others
    assert "linear_probe, fine_tune" in message


def test_a_study_survives_being_sent_to_another_process():
    (study,) = list_studies([encoder("stacked_cnn", config={"channels": [8, 16]})], None, (5,))
    assert pickle.loads(pickle.dumps(study)) == study


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_study_is_what_its_mode_says(mode):
    study = StudyConfig("dinov2", encoder(), "all", mode)
    assert isinstance(study, RowConfig)
    assert (study.kind, study.name) == (mode.name, f"dinov2-{mode.name}")
    assert study.reads_features == (mode.reads == "features")
    assert study.uses_every_draw == mode.trains_every_draw


def test_folds_are_for_baselines_on_all_images():
    few, every = (probe for probe in list_studies([encoder()], None, (5, "all")) if probe.reads_features)
    assert [row.folds for row in list_baselines(every, BASELINES, refit=True, folds=5)] == [5] * len(BASELINES)
    assert [row.folds for row in list_baselines(few, BASELINES, refit=True, folds=5)] == [None] * len(BASELINES)


def test_baselines_stand_beside_the_study_that_reads_features():
    probe, tuned = list_studies([encoder()], None, (5,))
    found = list_baselines(probe, BASELINES, refit=True)
    assert found == tuple(BaselineConfig("dinov2", encoder(), 5, baseline, refit=True) for baseline in BASELINES)
    assert [(row.kind, row.name) for row in found[:2]] == [("knn", "dinov2-knn-5shot"), ("ridge", "dinov2-ridge-5shot")]
    assert all(row.reads_features and row.uses_every_draw for row in found)
    assert list_baselines(tuned, BASELINES, refit=True) == list_baselines(probe, (), refit=True) == ()


def test_a_row_is_a_study_or_a_baseline():
    with pytest.raises(TypeError):
        RowConfig("dinov2", encoder(), "all")
