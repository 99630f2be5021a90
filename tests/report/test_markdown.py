from run_folder import make_row, make_run

from raysweep.report.markdown import escaped, render_markdown
from raysweep.report.run_files import read_run


def test_the_text_has_the_answer_the_leaderboard_and_the_classes(tmp_path):
    text = render_markdown(read_run(str(make_run(tmp_path).root)))
    lines = text.splitlines()
    assert "cnn fine\\_tune is first on validation" in lines[2]
    board = [line for line in lines if line.startswith("| ") and "\\[0.610, 0.920\\]" in line]
    assert [line.split(" | ")[1] for line in board] == ["cnn", "dino"]
    assert "lr 0.01, 4 epochs" in board[0]
    assert "| ant | 0.800 | 0.800 | 0.800 | 10 |" in text


def test_names_cannot_be_markup(tmp_path):
    assert escaped("<b>|a_b*") == "&lt;b&gt;\\|a\\_b\\*"
    row = make_row(encoder="a|b")
    text = render_markdown(read_run(str(make_run(tmp_path, rows=[row]).root)))
    assert "| a\\|b |" in text
