"""The experiment files that ship: each parses, says what to expect, and is what the schema allows."""

import json
from pathlib import Path

import jsonschema
import pytest

from raysweep import run
from raysweep.experiment.config import experiment_schema, load_experiment
from raysweep.experiment.yaml_file import read_yaml

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
FILES = sorted(EXPERIMENTS.glob("*.yaml"))


def test_all_the_promised_files_are_there():
    promised = {"quickstart", "stacked_cnn", "dinov2", "clip", "siglip", "beans", "few_shot"}
    assert promised <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_parses_and_its_header_says_what_to_expect(file: Path):
    experiment = load_experiment(file)
    assert experiment.name == file.stem
    text = file.read_text()
    assert len(text.splitlines()) <= 40
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for word in ("command", "expected", "cost"):
        assert word in header
    jsonschema.validate(read_yaml(file).data, experiment_schema())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_whose_data_is_local_can_be_planned(file: Path, capsys: pytest.CaptureFixture[str]):
    experiment = load_experiment(file)
    if experiment.data.source.startswith("hf://"):
        pytest.skip("its images are on the Hugging Face hub")
    assert run.main([str(file), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for study in experiment.studies():
        assert study.name in plan


def test_the_published_comparison_is_one_file():
    studies = {study.name for study in load_experiment(EXPERIMENTS / "beans.yaml").studies()}
    probes = {"dinov2-linear_probe", "clip-linear_probe", "siglip-linear_probe"}
    assert studies == {"stacked_cnn-from_scratch", "dinov2-fine_tune", *probes}


def test_the_committed_schema_is_the_current_one():
    assert json.loads((EXPERIMENTS / "schema.json").read_text()) == experiment_schema()
