import errno
import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from raysweep.results import progress as module
from raysweep.results.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def plain():
    return Progress(Console(file=io.StringIO(), width=60, highlight=False, soft_wrap=True))


def text_of(progress):
    return progress.console.file.getvalue()


def test_lines_are_stamped_and_never_wrapped_or_interpreted(clock):
    progress = plain()
    clock.now += 12.34
    with progress:
        progress.say("/data/:smile:/[red]/" + 80 * "x")
        progress.warn("class [bold] :boom: of /a")
    first, second = text_of(progress).splitlines()
    assert first == "[  12.3 s] /data/:smile:/[red]/" + 80 * "x"
    assert second == "warning: class [bold] :boom: of /a"


def test_without_a_terminal_a_stage_says_something_every_ten_seconds(clock):
    with plain() as progress:
        stage = progress.stage("decoding", 100)
        for done in range(100):
            clock.now += 0.25
            stage.update(done, "best 0.9" if done > 50 else "")
        stage.update(100)
        stage.finish()
    assert text_of(progress).splitlines() == ["[  10.2 s] decoding: 40/100", "[  20.5 s] decoding: 81/100, best 0.9"]


def test_stages_side_by_side_keep_their_own_time(clock):
    with plain() as progress:
        first = progress.stage("first", 4)
        clock.now += 6
        second = progress.stage("second", 8)
        clock.now += 6
        second.update(1)
        first.update(2)
        clock.now += 6
        second.update(3)
        first.update(3)
    assert text_of(progress).splitlines() == ["[  12.0 s] first: 2/4", "[  18.0 s] second: 3/8"]


def test_a_finished_stage_is_not_reported_again(clock):
    with plain() as progress:
        stage = progress.stage("decoding", 5)
        clock.now += 60
        stage.update(5)
    assert text_of(progress) == ""


def on_terminal():
    return Progress(Console(file=io.StringIO(), width=100, force_terminal=True, highlight=False))


def test_a_terminal_gets_a_bar_that_is_taken_away():
    with on_terminal() as progress:
        stage = progress.stage("dinov2-linear_probe", 8)
        stage.update(3, "best 0.91")
        progress._bar.refresh()
        shown = text_of(progress)
        assert all(part in shown for part in ("dinov2-linear_probe", "3/8", "best 0.91"))
        progress.say("a line above the bar")
        stage.finish()
        assert progress._bar.task_ids == []
    assert "a line above the bar" in text_of(progress)
    assert progress._bar.live.is_started is False


def test_stages_side_by_side_have_a_bar_each_and_late_news_is_ignored():
    with on_terminal() as progress:
        first, second = progress.stage("first", 2), progress.stage("second", 4)
        first.update(1)
        second.update(3)
        assert [(task.description, task.completed) for task in progress._bar.tasks] == [("first", 1), ("second", 3)]
        first.finish()
        first.finish()
        first.update(2, "late")
        assert [task.description for task in progress._bar.tasks] == ["second"]


def fail_within(progress):
    with progress:
        progress.stage("first", 2)
        raise ValueError("boom")


def test_the_terminal_is_restored_when_a_stage_fails():
    progress = on_terminal()
    with pytest.raises(ValueError, match="boom"):
        fail_within(progress)
    assert progress._bar.live.is_started is False


@pytest.mark.parametrize("is_terminal", [True, False])
def test_labels_can_neither_steer_the_terminal_nor_be_markup(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=90, color_system=None, soft_wrap=True)
    with Progress(console) as progress:
        progress.say("a\x1b]0;x\x07\nb [red]c[/red] :smile:")
        progress.warn("d\u202ee")
        stage = progress.stage("[blue]probe\x1b[2J[/blue]", 2)
        stage.update(1, "best [bold]\x1b[3J")
        if progress._bar:
            progress._bar.refresh()
        stage.finish()
    text = text_of(progress)
    assert "a\\x1b]0;x\\x07\\nb [red]c[/red] :smile:" in text
    assert "warning: d\\u202ee" in text
    for steering in ("\x1b]0", "\x1b[2J", "\x1b[3J", "\u202e", "\x07"):
        assert steering not in text
    if is_terminal:
        assert "[blue]probe\\x1b[2J[/blue]" in text


class FullDisk(io.StringIO):
    refused = ""

    def write(self, text):
        self.refused += text
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_on_a_full_disk_ends_nothing():
    disk = FullDisk()
    progress = Progress(Console(file=disk))
    progress.say("a line")
    progress.warn("another")
    assert "a line" in disk.refused
    assert "another" in disk.refused
