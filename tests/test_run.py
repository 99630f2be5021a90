import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from raysweep import __main__, __version__, run
from raysweep.errors import DataError
from raysweep.experiment.config import load_experiment

SCHEMA = Path(__file__).resolve().parents[1] / "experiments" / "schema.json"
DIGITS = "data: {source: 'sklearn://digits'}\nencoders:\n  - type: stacked_cnn\n    image_size: 32\n"


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text=DIGITS):
        (tmp_path / "digits.yaml").write_text(text)
        return "digits.yaml"

    return write


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("EXPERIMENT.yaml", "--set", "--dry-run", "--print-schema", "--verbose"))


@pytest.mark.skipif(not SCHEMA.exists(), reason="experiments/schema.json is not written yet")
def test_the_schema_printed_is_the_one_committed(capsys):
    assert run.main(["--print-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(SCHEMA.read_text())


def test_no_experiment_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main([])
    assert stopped.value.code == 2
    assert "an experiment file is needed" in capsys.readouterr().err


def failure(capsys, *arguments):
    assert run.main(list(arguments)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_a_misspelt_key_gets_its_line_and_a_suggestion(experiment, capsys):
    err = failure(capsys, experiment(DIGITS + "    trainble: false\n"))
    assert err.startswith("error: digits.yaml: 1 problem")
    assert "encoders.0.trainble (line 5): unknown key; did you mean 'trainable'?" in err


def test_a_missing_experiment_file_is_named(experiment, capsys):
    assert "nothing.yaml" in failure(capsys, "nothing.yaml")


@pytest.mark.process
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_missing_data_folder_is_named(experiment, capsys, tmp_path, options):
    file = experiment(DIGITS.replace("sklearn://digits", "no/such/folder"))
    err = failure(capsys, file, *options, "--set", f"tracking.uri=sqlite:///{tmp_path}/m.db")
    assert "data.source:" in err
    assert "no/such/folder: no such file or folder" in err


def test_a_bad_override_is_named(experiment, capsys):
    assert "train.batch_size" in failure(capsys, experiment(), "--set", "train.batch_size=many", "--dry-run")


def test_a_storage_that_cannot_be_one_is_named(experiment, capsys):
    Path("runs").write_text("")
    assert "storage: 'runs' cannot be a folder" in failure(capsys, experiment())


def test_a_dry_run_in_a_job_refuses_what_the_sweep_would(experiment, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "storage: 'runs' is relative" in failure(capsys, experiment(), "--dry-run")


def test_verbose_shows_the_traceback(experiment):
    file = experiment(DIGITS.replace("sklearn://digits", "no/such/folder"))
    with pytest.raises(DataError, match="no such file or folder"):
        run.main([file, "--dry-run", "--verbose"])


def test_ctrl_c_ends_with_130_and_what_to_do(experiment, capsys, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_plan", interrupted)
    assert run.main([experiment(), "--dry-run"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


@pytest.mark.process
def test_a_dry_run_prints_the_plan_and_starts_nothing(experiment, tmp_path):
    code = (
        "import sys; from raysweep import run\n"
        "status = run.main(sys.argv[1:])\n"
        "print('heavy:', sorted({'ray', 'mlflow', 'optuna'} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(status)"
    )
    overrides = ["--set", "search.from_scratch.num_trials=5", "--set", "resources.use_gpu=false"]
    command = [sys.executable, "-c", code, experiment(), "--dry-run", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stderr
    assert "stacked_cnn-from_scratch: 5 trials (tpe)" in done.stdout
    assert "  train: 1,2" in done.stdout
    assert all(f" {digit} " in done.stdout.replace("(", " ") for digit in range(10))
    assert "present:" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["digits.yaml"]


def test_the_next_steps_name_the_best_model_that_there_is(experiment, tmp_path):
    loaded = load_experiment(Path(experiment()))
    models = [None, f"{tmp_path}/runs/digits/models/ridge", "/elsewhere/probe"]
    steps = run._next_steps(loaded, [SimpleNamespace(model_path=model) for model in models])
    assert [step for step in steps if step.startswith("predict")] == [
        "predict    raysweep predict runs/digits/models/ridge IMAGE [IMAGE ...]"
    ]
    steps = run._next_steps(loaded, [SimpleNamespace(model_path=None)])
    assert not any(step.startswith("predict") for step in steps)


def test_commands_in_the_next_steps_can_be_pasted(experiment, tmp_path):
    folder, uri = "my runs/#1 50% $HOME; echo 'x'", "sqlite:///my runs/#1 50%.db"
    loaded = load_experiment(Path(experiment()), [f"tracking.uri={json.dumps(uri)}"])
    steps = run._next_steps(loaded, [SimpleNamespace(model_path=f"{tmp_path}/{folder}/models/ridge")])
    commands = [step.split(maxsplit=1)[1] for step in steps if step.startswith(("predict", "compare"))]
    assert [shlex.split(command) for command in commands] == [
        ["raysweep", "predict", f"{folder}/models/ridge", "IMAGE", "[IMAGE", "...]"],
        ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "mlflow", "ui", "--backend-store-uri", uri],
    ]


def test_class_names_cannot_steer_the_terminal(experiment, capsys, tmp_path):
    for split in ("train", "test"):
        for name in ("a\x1b[2Jb", "[red]c\u202e"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (8, 8), (number, len(name), len(split))).save(
                    tmp_path / "images" / split / name / f"{number}.png"
                )
    assert run.main([experiment(DIGITS.replace("sklearn://digits", "images")), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[2Jb 8" in out
    assert "[red]c\\u202e 8" in out
    assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("sqlite:///m.db", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --backend-store-uri sqlite:///m.db"),
        ("https://mlflow.example", "https://mlflow.e"),
    ],
)
def test_the_next_steps_say_where_runs_are_compared(experiment, uri, told):
    loaded = load_experiment(Path(experiment()), [f"tracking.uri={uri}"])
    assert any(step.startswith(f"compare    {told}") for step in run._next_steps(loaded, []))
    steps = run._next_steps(loaded, [], "/#/experiments/7/runs")
    address = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    assert any(step.endswith(f"{address}/#/experiments/7/runs") for step in steps)


def test_the_console_script_shares_its_commands(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["raysweep", "--version"])
    assert __main__.main() == 0
    assert capsys.readouterr().out.strip() == __version__
    monkeypatch.setattr("sys.argv", ["raysweep", "rnu"])
    assert __main__.main() == 2
    assert "usage: raysweep {run,submit,predict,report}" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["raysweep", "run", "nothing.yaml"])
    assert __main__.main() == 1
