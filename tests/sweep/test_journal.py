"""The journal of Optuna's studies, when it was cut, damaged, or could not be written."""

import errno
import json
import os

import pytest
from jobs import make_result, make_trial
from optuna.trial import TrialState

from raysweep.errors import DataError, ResourceError
from raysweep.experiment.search_blocks import LinearProbeSearch, study_space
from raysweep.sweep import journal as module
from raysweep.sweep.journal import open_journal
from raysweep.sweep.optuna_study import open_optuna_study
from raysweep.sweep.trial_store import open_store
from raysweep.training.ranking import Ranking

GRID = {"learning_rate": {"choices": [1e-3, 1e-2]}, "epochs": {"choices": [5, 6, 7]}, "normalize": "none"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optuna.journal"


def open_study(path, num_trials=6, seed=1, **keys):
    block = LinearProbeSearch.model_validate({"num_trials": num_trials, **keys})
    space = study_space(block, ["cls"], "dinov2")
    return open_optuna_study(open_store(path, lambda _text: None), "study", block, space, Ranking(), seed)


def score(setting):
    return 1 - abs(setting["learning_rate"] - 0.01) - 0.001 * setting["epochs"]


def run(study, size=3):
    """Runs what is left of the budget, in Populations."""
    while study.num_remaining:
        for trial in study.ask(min(size, study.num_remaining)):
            spec = make_trial(trial.number, setting=dict(trial.params))
            study.tell(trial, make_result(spec, score(trial.params)))
    return study


def settings(study):
    return sorted(json.dumps(result.setting, sort_keys=True) for result in study.results if result.error is None)


# Cut


@pytest.mark.parametrize(
    ("keys", "step"),
    [
        ({"sampler": "grid", "space": GRID}, 1),
        ({"num_trials": 14, "population": 3}, 7),  # of which TPE draws the last four
        ({"sampler": "random", "num_trials": 5, "population": 2}, 2),
    ],
)
def test_a_journal_cut_after_any_record_goes_on_to_the_same_settings_each_once(path, keys, step):
    whole = settings(run(open_study(path, **keys)))
    content = path.read_bytes()
    cuts = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for cut in [0, *cuts[::step], cuts[-2]]:
        path.write_bytes(content[:cut])
        assert settings(run(open_study(path, **keys))) == whole, f"cut at byte {cut}"


def test_a_journal_cut_within_a_record_goes_on_and_says_what_was_cut_off(path):
    keys = {"sampler": "grid", "space": GRID}
    whole = settings(run(open_study(path, **keys)))
    content = path.read_bytes()
    for cut in range(7, len(content), 397):
        path.write_bytes(content[:cut])
        said = []
        open_journal(path, said.append)
        assert path.read_bytes() == content[: content.rfind(b"\n", 0, cut) + 1]
        assert bool(said) == (content[cut - 1 : cut] != b"\n")
        assert all("optuna.journal: its last line was incomplete" in text for text in said)
        study = run(open_study(path, **keys))
        assert settings(study) == whole, f"cut at byte {cut}"
        assert len([trial for trial in study.study.trials if trial.state == TrialState.COMPLETE]) == 6
        open_study(path, **keys)  # and can be read once more


@pytest.mark.parametrize(
    "tail", [b"\0" * 300, b'{"op_code":4', b"\n", b'{"op_code":4,"worker\n', b"17\n", b"[]\n", "é".encode()[:1]]
)
def test_whatever_a_crash_leaves_behind_the_last_record_is_cut_off(path, tail):
    run(open_study(path))
    content = path.read_bytes()
    path.write_bytes(content + tail)
    open_journal(path, lambda _text: None)
    assert path.read_bytes() == content
    assert len(open_study(path).results) == 6


def test_a_last_line_longer_than_what_is_read_at_a_time_is_found(path, monkeypatch):
    monkeypatch.setattr(module, "TAIL_BYTES", 10)
    run(open_study(path))
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    open_journal(path, lambda _text: None)
    assert path.read_bytes() == content[: content[:-3].rfind(b"\n") + 1]


# Damaged


@pytest.mark.parametrize("bad", ["", "garbage", '{"op_code":5,"par{"op_code":6}', "[1]", '{"no": "op_code"}', "\0\0"])
def test_a_bad_line_elsewhere_is_named_with_its_file_and_a_remedy(path, bad):
    run(open_study(path))
    lines = path.read_text().splitlines()
    lines[19] = bad
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"optuna\.journal: line 20 is not a record.*its first 19 lines"):
        open_study(path)
    path.write_text("\n".join(lines[:19]) + "\n")  # the remedy
    assert len(run(open_study(path)).results) == 6


def test_records_that_contradict_each_other_are_a_clear_error(path):
    run(open_study(path))
    lines = path.read_text().splitlines()
    record = json.loads(lines[-1])
    path.write_text("\n".join([*lines, json.dumps({**record, "op_code": 99}), lines[-1]]) + "\n")
    with pytest.raises(DataError, match=r"optuna\.journal: Optuna cannot read it \(AssertionError.*move the file away"):
        open_study(path)


def test_a_lock_that_a_killed_process_left_is_no_reason_to_wait(path):
    run(open_study(path, num_trials=2))
    (path.parent / "optuna.journal.lock").symlink_to(path)
    (path.parent / "optuna.journal.lock-1.rename").symlink_to(path)
    assert len(run(open_study(path)).results) == 6
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# A disk that is full for a moment


@pytest.mark.parametrize("can_truncate", [True, False])
def test_a_full_disk_ends_the_sweep_with_its_reason_and_leaves_no_part_of_a_record(path, monkeypatch, can_truncate):
    study = run(open_study(path, num_trials=2))
    study.block = study.block.model_copy(update={"num_trials": 4})
    before = path.read_bytes()
    write, truncate = os.write, os.ftruncate

    def write_a_part(handle, content):
        write(handle, bytes(content[:11]))
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(handle, size):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(module.os, "write", write_a_part)
    if not can_truncate:
        monkeypatch.setattr(module.os, "ftruncate", fail)
    with pytest.raises(ResourceError, match=r"optuna\.journal: cannot be written to \(No space left on device\)"):
        study.ask(1)
    monkeypatch.setattr(module.os, "write", write)
    monkeypatch.setattr(module.os, "ftruncate", truncate)
    assert (path.read_bytes() == before) is can_truncate
    assert len(run(study).results) == 4, "the same sweep goes on"
    again = open_study(path, num_trials=5)
    assert (len(again.results), again.num_remaining) == (4, 1)


# Many trials


def test_a_journal_is_read_once_however_many_records_are_appended(path, monkeypatch):
    study = run(open_study(path, num_trials=4))
    num_parsed = 0
    parse = module.parse_record

    def count(line):
        nonlocal num_parsed
        num_parsed += 1
        return parse(line)

    monkeypatch.setattr(module, "parse_record", count)
    before = path.read_bytes().count(b"\n")
    study.block = study.block.model_copy(update={"num_trials": 40})
    run(study, size=12)
    assert num_parsed == path.read_bytes().count(b"\n") - before
