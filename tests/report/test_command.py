import json
import subprocess
import sys

import pytest
from run_folder import make_row, make_run

from raysweep.report.__main__ import main
from raysweep.report.run_files import read_run
from raysweep.storage.copies import fetch, local_path
from raysweep.training.intervals import FoldEstimate


def test_the_report_is_made_again_from_the_folder(tmp_path, capsys):
    paths = make_run(tmp_path)
    assert main([str(paths.root)]) == 0
    assert capsys.readouterr().out == f"{paths.report_html}\n"
    first = paths.report_html.read_text()
    assert paths.report_md.exists()
    paths.report_html.unlink()
    assert main([str(paths.root) + "/", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert paths.report_html.read_text() == first


def test_another_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no leaderboard.json; expected the folder of a sweep" in capsys.readouterr().err


@pytest.mark.process
def test_the_report_of_a_sweep_in_a_bucket_is_made_where_nothing_of_it_is(tmp_path, bucket, monkeypatch, capsys):
    make_run(tmp_path, storage=bucket)
    monkeypatch.setenv("RAYSWEEP_SCRATCH", str(tmp_path / "node-1"))
    assert main([f"{bucket}/x"]) == 0
    assert capsys.readouterr().out == f"{bucket}/x/report.html\n"
    here = [path.name for path in (tmp_path / "node-1").rglob("*") if path.is_file()]
    assert "test_rows.parquet" not in here
    page = fetch(local_path(f"{bucket}/x/report.html")).read_text()
    assert "Most confident mistakes" in page
    assert "Left out" not in page


@pytest.mark.process
def test_the_command_imports_neither_torch_nor_ray(tmp_path):
    paths = make_run(tmp_path)
    heavy = "[name for name in ('torch', 'ray', 'mlflow', 'optuna', 'transformers') if name in sys.modules]"
    code = f"import sys; from raysweep.report.__main__ import main; main(sys.argv[1:]); print({heavy})"
    found = subprocess.run(
        [sys.executable, "-c", code, str(paths.root), "--quiet"], capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"


def test_a_report_reads_the_estimate_over_folds(tmp_path):
    rows = [make_row(folds=FoldEstimate(0.85, 0.8, 0.9, (0.8, 0.9))), make_row("dino-knn")]
    found = read_run(str(make_run(tmp_path, rows=rows).root))
    assert {row.study: row.folds and row.folds.describe() for row in found.rows} == {
        "cnn-fine_tune": "0.850 [0.800, 0.900]", "dino-knn": None
    }  # fmt: skip
    assert found.missing == read_run(str(make_run(tmp_path / "plain").root)).missing


@pytest.mark.parametrize(
    ("content", "reason"), [([], "it has no rows"), ([{"study": "a"}], "not a leaderboard"), (3, "not a leaderboard")]
)
def test_a_leaderboard_that_cannot_be_read_is_an_error(tmp_path, capsys, content, reason):
    paths = make_run(tmp_path)
    paths.leaderboard_json.write_text(json.dumps(content))
    assert main([str(paths.root)]) == 1
    assert f"leaderboard.json: {reason}" in capsys.readouterr().err
