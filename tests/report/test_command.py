import subprocess
import sys

import pytest
from run_folder import make_run

from raysweep.report.__main__ import main


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
def test_the_command_imports_neither_torch_nor_ray(tmp_path):
    paths = make_run(tmp_path)
    heavy = "[name for name in ('torch', 'ray', 'mlflow', 'optuna', 'transformers') if name in sys.modules]"
    code = f"import sys; from raysweep.report.__main__ import main; main(sys.argv[1:]); print({heavy})"
    found = subprocess.run(
        [sys.executable, "-c", code, str(paths.root), "--quiet"], capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"
