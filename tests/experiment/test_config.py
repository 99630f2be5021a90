import json
import subprocess
import sys

import jsonschema
import pytest

from raysweep.errors import ConfigError
from raysweep.experiment.config import (
    DataConfig,
    Experiment,
    SearchConfig,
    experiment_schema,
    load_experiment,
    resolved_yaml,
)
from raysweep.experiment.modes import MODES
from raysweep.experiment.space import Choices, FloatRange, IntRange
from raysweep.experiment.yaml_file import read_yaml

EXAMPLE = """\
name: beans                      # default: the file's stem
seed: 42
storage: runs                    # local folder or s3://, gs://...
data:
  source: hf://datasets/AI-Lab-Makerere/beans   # or a folder split/class/*.jpg or class/*.jpg; .csv .tsv .parquet .jsonl; s3:// gs:// hf://; sklearn://digits
  image: image_path              # tables: column with a path (relative to the table), bytes, or a {bytes, path} struct
  label: label                   # strings or integers
  split: split                   # optional column: train/validation/test or 0/1/2; 'val', 'valid', 'dev' understood
  validation_fraction: 0.1       # taken from train, stratified, by seed, when there is none; likewise test_fraction
  test_fraction: 0.2
  max_bad_fraction: 0.01
  shots: [5, all]                # optional: images per class; each value is its own study; nested subsets
  few_shot_seeds: 3              # random draws of each few-shot training set; figures are means over them
encoders:
  - type: dinov2                 # stacked_cnn | dinov2 | clip | siglip | auto
    pretrained_model_name_or_path: facebook/dinov2-base   # hub id or local folder
    use_pretrained: true
    revision: main
    image_size: null             # default: the encoder's own (224 for dinov2)
    config: {}                   # overrides of the transformers config (hidden_size, ...), only with use_pretrained: false
modes: [linear_probe, fine_tune] # default: what makes sense for the encoder; an encoder's own `trainable: true|false` wins (Ludwig's key)
search:
  linear_probe: {num_trials: 64, baselines: [knn], space: {learning_rate: {low: 1e-4, high: 1e-1, log: true}, epochs: {low: 5, high: 50}, weight_decay: {low: 1e-6, high: 1e-1, log: true}, features: {choices: [cls, cls+mean]}, normalize: {choices: [none, standardize]}}}
  fine_tune:    {num_trials: 8,  space: {learning_rate: {low: 1e-6, high: 1e-3, log: true}, epochs: {low: 3, high: 20}}}
  from_scratch: {num_trials: 12, space: {learning_rate: {low: 1e-4, high: 1e-2, log: true}, epochs: {low: 10, high: 60}}}
metric: val/accuracy             # or val/macro_f1, val/loss (direction follows)
# each search block also takes: sampler (tpe | random | grid), time_budget_s, population (heads per Train run; auto)
train: {batch_size: 64, precision: auto, early_stopping_patience: 5}
resources: {num_workers: 1, use_gpu: auto, cpus_per_worker: 1, gpus_per_worker: 1, max_concurrent_trials: auto, max_concurrent_studies: 2, feature_memory_gb: 1.5}
tracking: {uri: "sqlite:///mlflow.db", experiment: null, register_model: null}
"""  # noqa: E501

MINIMAL = "data: {source: sklearn://digits}\nencoders: [{type: dinov2}]\n"


@pytest.fixture
def load(tmp_path):
    def load_text(text, overrides=()):
        path = tmp_path / "my_beans.yaml"
        path.write_text(text)
        return load_experiment(path, overrides)

    return load_text


def problems(load, text, overrides=()):
    with pytest.raises(ConfigError) as error:
        load(text, overrides)
    first, *lines = str(error.value).splitlines()
    assert first.endswith(f"my_beans.yaml: {len(lines)} problem{'s' * (len(lines) > 1)}")
    return [line.strip() for line in lines]


def test_the_documented_example_loads(load):
    experiment = load(EXAMPLE)
    assert (experiment.data.shots, experiment.data.few_shot_seeds) == ((5, "all"), 3)
    assert (experiment.resources.max_concurrent_studies, experiment.resources.feature_memory_gb) == (2, 1.5)
    probe = experiment.search.linear_probe
    assert probe.baselines == ("knn",)
    assert probe.space["weight_decay"] == FloatRange(low=1e-6, high=1e-1, log=True)
    assert probe.space["features"] == Choices(choices=("cls", "cls+mean"))
    assert experiment.search.fine_tune.space["epochs"] == IntRange(low=3, high=20)
    assert experiment.search.fine_tune.space["layer_decay"] == FloatRange(low=0.65, high=0.95)
    assert [study.name for study in experiment.studies()][:2] == ["dinov2-linear_probe-5shot", "dinov2-fine_tune-5shot"]


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE,
        MINIMAL,
        MINIMAL + "search: {linear_probe: {sampler: grid, space: {learning_rate: {choices: [1e-3, 1]}}}}\n",
        MINIMAL + "search: {linear_probe: {baselines: []}}\n",
        "data: {source: x}\nencoders: [{type: stacked_cnn, config: {channels: [8]}}, {type: clip, revision: '1e5'}]\n",
        MINIMAL + "search: {fine_tune: {scheduler: asha}, from_scratch: {scheduler: median, space: {epochs: 9}}}\n",
        MINIMAL + "train: {augmentation: null}\nresources: {use_gpu: false, max_concurrent_trials: 3}\n",
    ],
)
def test_resolved_yaml_and_dicts_give_an_equal_experiment(load, text):
    experiment = load(text)
    assert load(resolved_yaml(experiment)) == experiment
    assert Experiment.model_validate(experiment.model_dump()) == experiment
    assert Experiment.model_validate(json.loads(experiment.model_dump_json())) == experiment


def test_defaults(load):
    experiment = load(MINIMAL)
    assert experiment.name == "my_beans"
    assert experiment.search == SearchConfig()
    assert experiment.search.linear_probe.space == MODES["linear_probe"].default_space
    num_trials = {name: experiment.search.block(mode).num_trials for name, mode in MODES.items()}
    assert num_trials == {"linear_probe": 64, "fine_tune": 8, "from_scratch": 12}
    assert experiment.search.linear_probe.baselines == ("knn", "ridge", "logistic")
    assert experiment.search.linear_probe.refit
    assert experiment.data.few_shot_seeds == 5
    assert (experiment.resources.max_concurrent_studies, experiment.resources.feature_memory_gb) == ("auto", 4)
    assert experiment.train.augmentation.min_crop_scale == 0.7
    assert experiment.direction == "maximize"
    assert load(MINIMAL, ["metric=val/loss"]).direction == "minimize"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("resources: {gpus_per_worker: 1.5}", "resources.gpus_per_worker (line {})"),
        ("resources: {pixel_disk_gb: lots}", "resources.pixel_disk_gb (line {})"),
        ("train: {ema_decay: 1.0}", "train.ema_decay (line {})"),
        ("train: {label_smoothing: 1.0}", "train.label_smoothing (line {})"),
        ("train: {augmentation: {mixup: -1}}", "train.augmentation.mixup (line {})"),
        ("search: {fine_tune: {space: {augmentation_strength: 1.5}}}",
         "search.fine_tune.space.augmentation_strength (line {}): must be 1 or less, found 1.5"),
        ("train: {augmentation: null}\nsearch: {from_scratch: {space: {augmentation_strength: {low: 0, high: 1}}}}",
         "train.augmentation (line {}): is null, and search.from_scratch.space.augmentation_strength scales it"),
    ],
)  # fmt: skip
def test_keys_of_training_are_checked(load, extra, message):
    (line,) = problems(load, MINIMAL + extra)
    assert message.format(MINIMAL.count("\n") + 1) in line


def test_the_baselines_of_a_study_are_those_on_its_features(load):
    experiment = load(MINIMAL, ["data.shots=[5, all]"])
    found = {study.name: [row.name for row in experiment.baselines_of(study)] for study in experiment.studies()}
    assert found == {
        "dinov2-linear_probe-5shot": ["dinov2-knn-5shot", "dinov2-ridge-5shot", "dinov2-logistic-5shot"],
        "dinov2-fine_tune-5shot": [],
        "dinov2-linear_probe": ["dinov2-knn", "dinov2-ridge", "dinov2-logistic"],
        "dinov2-fine_tune": [],
    }
    assert {row.refit for study in experiment.studies() for row in experiment.baselines_of(study)} == {True, False}
    kept = load(MINIMAL, ["search.linear_probe.refit=false"])
    assert not any(row.refit for study in kept.studies() for row in kept.baselines_of(study))
    assert not any(map(kept.refits, kept.studies()))
    assert [study.name for study in experiment.studies() if experiment.refits(study)] == ["dinov2-linear_probe"]
    without = load(MINIMAL, ["search.linear_probe.baselines=[]"])
    assert [without.baselines_of(study) for study in without.studies()] == [(), ()]


def test_the_experiment_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load(MINIMAL).seed = 1


def test_grid_counts_its_own_trials(load):
    space = "space: {{learning_rate: {{choices: [1e-3, 1e-2]}}, normalize: l2}}"
    block = "search: {{linear_probe: {{sampler: grid, {} " + space + "}}}}\n"
    assert load(MINIMAL + block.format("")).search.linear_probe.num_trials == 2
    assert load(MINIMAL + block.format("num_trials: 1,")).search.linear_probe.num_trials == 1
    assert load(MINIMAL + block.format("num_trials: 99,")).search.linear_probe.num_trials == 2


def test_schema_is_valid_and_accepts_the_example(load, tmp_path):
    schema = experiment_schema()
    jsonschema.Draft202012Validator.check_schema(schema)  # raises
    validator = jsonschema.Draft202012Validator(schema)
    for text in (
        EXAMPLE,
        MINIMAL,
        resolved_yaml(load(EXAMPLE)),
        MINIMAL + "search: {fine_tune: {space: {epochs: 10}}}\n",
    ):
        (tmp_path / "x.yaml").write_text(text)
        assert list(validator.iter_errors(read_yaml(tmp_path / "x.yaml").data)) == []


@pytest.mark.parametrize(
    "extra",
    [
        "sed: 1",
        "search: {fine_tune: {space: {epochs: 1.5}}}",
        "search: {fine_tune: {space: {features: cls}}}",
        "search: {fine_tune: {space: {epochs: {low: 1}}}}",
        "train: {batch_size: '8'}",
        "search: {linear_probe: {baselines: [svm]}}",
        "search: {linear_probe: {scheduler: asha}}",
    ],
)
def test_schema_refuses_what_the_loader_refuses(load, tmp_path, extra):
    (tmp_path / "x.yaml").write_text(MINIMAL + extra)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read_yaml(tmp_path / "x.yaml").data, experiment_schema())
    assert problems(load, MINIMAL + extra)


def test_every_key_of_the_schema_is_described():
    schema = experiment_schema()
    for block in [schema, *schema["$defs"].values()]:
        for key, field in block.get("properties", {}).items():
            assert field.get("description"), key


def test_importing_needs_neither_torch_nor_ray():
    check = "import sys, raysweep.experiment.config; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_fractions_must_leave_something_to_train_on():
    with pytest.raises(ValueError, match="must stay below 1"):
        DataConfig(source="x", validation_fraction=0.5, test_fraction=0.5)


# Where things are kept


PLACES = {
    "RAYSWEEP_STORAGE": "s3://bucket/team",
    "MLFLOW_TRACKING_URI": "https://mlflow.example",
    "RAYSWEEP_OPTUNA_URI": "postgresql://raysweep@database/optuna",
    "RAYSWEEP_WAIT_FOR_NODES_S": "900",
}


def test_what_the_file_leaves_open_the_environment_answers(load, monkeypatch):
    for name, value in PLACES.items():
        monkeypatch.setenv(name, value)
    experiment = load(MINIMAL)
    assert experiment.storage == "s3://bucket/team"
    assert experiment.tracking.uri == "https://mlflow.example"
    assert experiment.tracking.optuna_uri == "postgresql://raysweep@database/optuna"
    assert experiment.resources.wait_for_nodes_s == 900
    said = MINIMAL + "storage: here\ntracking: {uri: 'sqlite:///mine.db'}\nresources: {wait_for_nodes_s: 0}\n"
    experiment = load(said)
    assert (experiment.storage, experiment.tracking.uri) == ("here", "sqlite:///mine.db")
    assert (experiment.tracking.optuna_uri, experiment.resources.wait_for_nodes_s) == (PLACES["RAYSWEEP_OPTUNA_URI"], 0)
    assert load(said, ["storage=there"]).storage == "there"


def test_an_empty_variable_answers_nothing(load, monkeypatch):
    for name in PLACES:
        monkeypatch.setenv(name, "")
    assert load(MINIMAL) == load(MINIMAL + "storage: runs\n")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("RAYSWEEP_STORAGE", "http://x", "storage (RAYSWEEP_STORAGE of the environment): accepted: a folder, s3://"),
        ("RAYSWEEP_OPTUNA_URI", "mysql://h/x", "tracking.optuna_uri (RAYSWEEP_OPTUNA_URI of the environment): accep"),
        ("RAYSWEEP_WAIT_FOR_NODES_S", "soon", "resources.wait_for_nodes_s (RAYSWEEP_WAIT_FOR_NODES_S of the environment"
         "): expected a number, found 'soon'"),
        ("MLFLOW_TRACKING_URI", "http://u:p@h", "tracking.uri (MLFLOW_TRACKING_URI of the environment): holds a pass"),
    ],
)  # fmt: skip
def test_a_variable_that_is_wrong_is_named(load, monkeypatch, name, value, problem):
    monkeypatch.setenv(name, value)
    (found,) = problems(load, MINIMAL + "tracking: {experiment: x}\n")
    assert found.startswith(problem)
    kept = {"RAYSWEEP_STORAGE": "storage=here", "MLFLOW_TRACKING_URI": "tracking.uri=sqlite:///x.db"}.get(name)
    if kept:
        load(MINIMAL, [kept])  # what is not asked cannot be wrong


def test_a_variable_is_text_and_not_yaml(load, monkeypatch):
    monkeypatch.setenv("RAYSWEEP_STORAGE", "12")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///a: b.db")
    assert (load(MINIMAL).storage, load(MINIMAL).tracking.uri) == ("12", "sqlite:///a: b.db")


@pytest.mark.parametrize("key", ["data.source", "encoders.0.pretrained_model_name_or_path"])
def test_a_place_with_credentials_is_refused_before_anything_logs_it(load, key):
    (found,) = problems(load, MINIMAL, [f"{key}=s3://key:secret@bucket/images"])
    assert found == f"{key} (--set): s3://...@...: credentials belong into the environment, not into the URI"


def test_weights_in_a_bucket_have_no_options(load):
    (found,) = problems(load, MINIMAL, ["encoders.0.pretrained_model_name_or_path='s3://b/w?region=x'"])
    assert found.startswith("encoders.0.pretrained_model_name_or_path (--set): holds no options")


@pytest.mark.parametrize(
    ("given", "kept"), [("s3://bucket/", "s3://bucket"), ("gs://b/x/y/", "gs://b/x/y"), ("a/b", "a/b")]
)
def test_storages(load, given, kept):
    assert load(MINIMAL + f"storage: {given}\n").storage == kept


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("storage: abfs://c@a/x\n", "storage (line 3): accepted: a folder, s3://bucket/prefix or gs://bucket/prefix"),
        ("storage: s3://\n", "storage (line 3): accepted: a folder"),
        ("storage: 's3://b/x?region=y'\n", "storage (line 3): holds no options and no credentials"),
        ("storage: s3://key:secret@b/x\n", "storage (line 3): holds no options and no credentials"),
        ("tracking: {optuna_uri: 'mysql://h/x'}\n", "tracking.optuna_uri (line 3): accepted: postgresql://"),
        ("tracking: {optuna_uri: 'postgresql://u:p@h/x'}\n", "tracking.optuna_uri (line 3): holds a password"),
        (
            "tracking: {optuna_uri: 'postgresql://u@h/x?password=p@1'}\n",
            "tracking.optuna_uri (line 3): holds a password",
        ),
        ("tracking: {uri: 'https://u:p@h'}\n", "tracking.uri (line 3): holds a password"),
        ("resources: {placement: spread}\n", "resources.placement (line 3)"),
    ],
)
def test_places_that_are_refused(load, text, problem):
    (found,) = problems(load, MINIMAL + text)
    assert found.startswith(problem)
    if "password" in problem:
        assert "environment: " in found
        assert ":p@" not in found
