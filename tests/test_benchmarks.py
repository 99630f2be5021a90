import io
import json
import math
import multiprocessing
import sys

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import bare_loop, busy, fine_tune, gpu, index, population, record, statistics
from benchmarks.figures import Options, Skipped, make_figure, print_table
from benchmarks.images import generate_images, repeat_images, source_images
from benchmarks.schedulers import Ended, seconds_until
from benchmarks.sweeps import DINOV2_SMALL, TINY_DINOV2, make_experiment, peak_memory_bytes, run_command
from raysweep.cluster.resources import local_resources
from raysweep.encoders import compiled
from raysweep.encoders.build import build_encoder
from raysweep.experiment.config import Experiment
from raysweep.experiment.sections import DataConfig
from raysweep.images.index import load_index


@pytest.fixture
def images(tmp_path):
    generate_images(tmp_path / "generated", num_per_class=4, side=40)
    return source_images(Options(quick=True, images=tmp_path / "generated", scratch=tmp_path))


def quick(tmp_path):
    return Options(quick=True, images=None, scratch=tmp_path)


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [(1.05, "<= 1.05", True), (1.06, "<= 1.05", False), (5, ">= 5", True), (4, ">= 5", False)],
)
def test_a_figure_is_judged_by_its_target(value, target, met):
    assert make_figure("bound", "slope", value, "x", target).met is met
    assert make_figure("bound", "slope", value, "x").met is None


def test_the_table_shows_what_is_missed():
    console = Console(file=io.StringIO(), width=120)
    print_table([make_figure("a", "one", 2, "s", "<= 1"), make_figure("b", "two", 0.5, "s", "<= 1")], console)
    first, second = (line for line in console.file.getvalue().splitlines() if "<= 1" in line)
    assert "one" in first
    assert "NO" in first
    assert "yes" in second


def test_the_command_keeps_every_line_and_goes_on_after_one_that_breaks(tmp_path, monkeypatch, capsys):
    def broken(options):
        yield make_figure("bound", "first", 1, "s", "<= 2")
        raise RuntimeError("no more")

    def skipped(options):
        raise Skipped("no device")

    for name, run in (("bound", broken), ("gpu", skipped), ("warm", lambda _: [make_figure("warm", "last", 2, "s")])):
        monkeypatch.setattr(f"benchmarks.{name}.run", run)
    out = tmp_path / "out" / "results.jsonl"
    assert command.main(["bound", "gpu", "warm", "--quick", "--out", str(out)]) == 1
    machine, first, stopped, absent, last = map(json.loads, out.read_text().splitlines())
    assert machine["machine"]["versions"]["torch"] == torch.__version__
    assert machine["quick"] is True
    assert (first["name"], first["value"], first["met"]) == ("first", 1, None)
    assert "no more" in stopped["broken"]
    assert absent == {"benchmark": "gpu", "skipped": "no device"}
    assert last["name"] == "last"
    assert "last" in capsys.readouterr().out


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        command.main(["bond", "--out", str(tmp_path / "out")])


def test_repeated_images_are_distinct_balanced_and_in_every_split(images, tmp_path):
    written = repeat_images(images, tmp_path / "repeated", 120)
    assert len({path.read_bytes() for path in written}) == len(written) == 120
    index = load_index(DataConfig(source=str(tmp_path / "repeated")), 0)
    assert index.counts() == {
        "train": {"a": 28, "b": 28, "c": 28},
        "validation": {"a": 6, "b": 6, "c": 6},
        "test": {"a": 6, "b": 6, "c": 6},
    }
    assert index.bad_rows == ()
    assert not any("duplicate" in warning for warning in index.warnings)


@pytest.mark.parametrize("forward_only", [False, True])
def test_the_bare_loop_takes_every_image_once(images, tmp_path, monkeypatch, forward_only):
    paths = repeat_images(images, tmp_path / "repeated", 27)
    seen = []
    monkeypatch.setattr(bare_loop, "forward", lambda _encoder, pixels, *_others: seen.append(np.stack(pixels)))
    counter, shape = multiprocessing.get_context("spawn").Value("q", 0), bare_loop.Shape("fp32", 4)
    loop = bare_loop.Loop(TINY_DINOV2, 0, paths, torch.get_num_threads(), forward_only, counter)
    loop.run(len(paths), shape)
    assert [len(batch) for batch in seen] == [4] * 6 + [3]
    expected = [bare_loop.decode(loop.encoder, path) for path in paths]
    assert (np.concatenate(seen) == np.stack(expected)).all()


def test_experiments_are_valid():
    experiment = Experiment.model_validate(make_experiment("x", "folder", [TINY_DINOV2], 8))
    assert experiment.search.linear_probe.num_trials == 8
    assert [study.mode.name for study in experiment.studies()] == ["linear_probe"]


def test_a_command_is_timed_and_its_lines_are_read(tmp_path):
    script = "import sys; print('out'); print('[   1.5 s] Ray is up', file=sys.stderr)"
    done = run_command(["-c", script], tmp_path)
    assert (done.stdout, done.stamp("Ray is up")) == ("out\n", 1.5)
    assert done.seconds > 0
    with pytest.raises(LookupError, match="done"):
        done.stamp("done")
    with pytest.raises(RuntimeError, match="some reason"):
        run_command(["-c", "raise SystemExit('some reason')"], tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_the_peak_of_memory_stays_after_it_was_given_back():
    before = peak_memory_bytes()
    del [bytearray(b"x") * (before + 50_000_000)][0]
    assert peak_memory_bytes() > before + 40_000_000


def test_the_population_benchmark_yields_both_ratios(tmp_path):
    loop, one_by_one = population.compare(quick(tmp_path), torch.device("cpu"), "population")
    details = loop.details
    assert loop.value == pytest.approx(details["loop_s"][0] / details["stacked_s"][0])
    assert one_by_one.value == pytest.approx(details["one_by_one_s"][0] / details["stacked_s"][0])
    assert details["num_heads"] == 20


def test_a_population_is_timed_beside_busy_loops(tmp_path, monkeypatch):
    monkeypatch.setattr(population, "NUM_REPEATS", 1)
    monkeypatch.setattr(population, "POPULATIONS", {"large": population.POPULATIONS["large"]})
    one, two = population.under_load(quick(tmp_path))
    quiet, beside_one, beside_two = one.details["seconds"]
    assert (one.value, two.value) == (beside_one / quiet, beside_two / quiet)


def test_the_loop_over_heads_learns():
    train, validation = (population.make_features(n, 16, 3, torch.device("cpu")) for n in (300, 100))
    settings = [{"learning_rate": rate, "weight_decay": 0.0, "epochs": 3} for rate in (1e-12, 1e-1)]
    torch.manual_seed(0)
    untrained, trained = population.train_by_loop(train, validation, settings, 3)
    assert trained > 0.9
    assert untrained < 0.9


def test_flops_are_counted_as_two_for_a_multiplication_and_an_addition():
    encoder = build_encoder(TINY_DINOV2, 0)
    tokens, width, blocks = 5, 32, 2
    patches = 2 * 4 * 3 * 14 * 14 * width
    products = 2 * tokens * width * width * (4 + 8) + 4 * tokens * tokens * width
    assert gpu.flops_per_image(encoder) == patches + blocks * products


@pytest.mark.ray
def test_without_a_gpu_a_stand_in_runs_the_same_code_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # there may be no C++ compiler
    found = list(gpu.run(quick(tmp_path)))
    assert all(figure.name.startswith("stand-in on a CPU, no GPU: ") and figure.target is None for figure in found)
    values = {figure.name.rpartition(": ")[2]: figure.value for figure in found}
    assert 0 <= values["pass, stall (the encoder waits for batches)"] <= 100
    rate, flops = values["bf16 matrix products"] * 1e12, gpu.flops_per_image(build_encoder(TINY_DINOV2, 0))
    for name in ("plain", "compiled"):
        share = 100 * values[name] * flops / rate
        assert values[f"{name}, share of the matrix rate"] == pytest.approx(share)
    gain = 1 / values["plain"] - 1 / values["compiled"]
    expected = values["compilation with its check"] / gain if gain > 0 else math.inf
    assert values["images that repay it"] == pytest.approx(expected)


@pytest.mark.end_to_end
def test_both_fine_tuning_loops_are_compared_on_a_quiet_and_on_a_busy_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fine_tune, "NUM_PAIRS", 1)
    monkeypatch.setattr(fine_tune, "ROWS_AT_ONCE", (8,))
    found = {figure.name: figure for figure in fine_tune.run(quick(tmp_path))}
    for name in ("dinov2-small, quiet", "dinov2-small, busy"):
        hand, ours = found[f"{name}: hand-written loop"].value, found[f"{name}: raysweep"].value
        assert found[f"{name}: raysweep / hand-written"].value == pytest.approx(ours / hand)
        tried = found[f"{name}: raysweep"].details["tried"]
        num_cpus = local_resources().num_cpus
        for layout in (f"1 x {num_cpus}", f"{num_cpus} x 1", f"{num_cpus} x 1 together"):
            assert tried[f"{layout}, fp32, 8"] > 0
        assert max(tried, key=tried.get) == found[f"{name}: raysweep"].details["best"]


def test_the_hand_written_loop_trains():
    model = fine_tune.make_model(TINY_DINOV2, torch.device("cpu"))
    before = model.head.weight.clone()
    pixels, labels = fine_tune.make_pixels(8, model.encoder.preprocessing.training_size, torch.device("cpu"))
    fine_tune.hand_written_epoch(model, pixels, labels, "fp32", 4)
    assert not torch.equal(model.head.weight, before)


def test_a_setting_is_found_when_a_trial_that_reached_it_has_ended():
    trials = [Ended(1.0, 0.5, 3), Ended(2.0, 0.0, 1), Ended(5.0, 0.9, 3), Ended(9.0, 0.8, 3)]
    assert seconds_until(trials, 0.9) == 5.0
    assert seconds_until(trials, 0.4) == 1.0
    assert seconds_until(trials, 0.95) == 9.0


def test_busy_loops_run_beside_a_block_and_end_with_it():
    with busy.busy_cores(2):
        loops = [child for child in psutil.Process().children() if busy.LOOP in child.cmdline()]
        assert len(loops) == 2
    assert not any(loop.is_running() for loop in loops)


@pytest.mark.end_to_end
def test_a_record_is_one_row_of_a_whole_command(tmp_path, capsys):
    generate_images(tmp_path / "generated", num_per_class=20, side=40)
    names = ["tiny-dinov2", "tiny-clip"]
    encoders = [part for name in names for part in ("--encoder", name)]
    sizes = ["--images", "60", "--trials", "2", "--price", "3.6"]
    record.main([*sizes, *encoders, "--folder", str(tmp_path / "generated")])
    heads, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines())
    cells = dict(zip(heads, row, strict=True))
    assert (cells["images"], cells["encoders"], cells["trials"]) == ("60", "2: tiny-dinov2, tiny-clip", "4")
    seconds = float(cells["whole command"].removesuffix(" s"))
    assert float(cells["images/s of the pass"]) > 60 / seconds
    assert float(cells["trials/hour"].replace(",", "")) == pytest.approx(4 * 3600 / seconds, rel=0.01)
    assert f"torch {torch.__version__}" in cells["versions"]


@pytest.mark.parametrize(
    ("uses_gpus", "price", "cost"),
    [
        (False, None, "0.200 CPU-hours"),
        (True, None, "0.200 GPU-hours"),
        (False, 0.5, "0.200 CPU-hours, 0.0500 at 0.5 an hour"),
    ],
)
def test_the_cost_of_a_record_is_that_of_all_its_devices(uses_gpus, price, cost):
    versions = dict.fromkeys(record.VERSIONS, "1.0")
    one = record.Record(10_000, ("a", "b"), 128, 360, 100, "chip", 2, uses_gpus, price, versions)
    assert one.columns() == {
        "images": "10,000",
        "encoders": "2: a, b",
        "trials": "128",
        "whole command": "360.0 s",
        "images/s of the pass": "100.0",
        "trials/hour": "1,280",
        "cost": cost,
        "device": "2 x chip",
        "versions": "raysweep 1.0, torch 1.0, ray 1.0",
    }
    assert record.markdown([one, one]).splitlines()[1:2] == ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    assert len(record.markdown([one, one]).splitlines()) == 4


def test_a_folder_is_an_encoder_too(tmp_path):
    assert record.encoder_block("dinov2-small") is DINOV2_SMALL
    for name, place in ((str(tmp_path), str(tmp_path)), ("owner/model", "owner/model")):
        assert record.encoder_block(name) == {"type": "auto", "pretrained_model_name_or_path": place}


@pytest.mark.ray
def test_an_index_is_measured_on_disk_and_of_made_up_rows(tmp_path):
    found = {figure.name: figure for figure in index.run(quick(tmp_path))}
    assert all(found[f"speed, {name}"].value > 0 for name in ("on disk", "on disk by tasks", "Parquet by tasks"))
    assert found["kept, made up"].value < found["peak, made up"].value
    assert found["kept, made up"].details["num_rows"] == 1_000


def test_statistics_are_simulated(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "TEST_ROWS", (10, 20))
    monkeypatch.setattr(statistics, "EQUAL_ROWS", {"two": statistics.EqualRows(0.9, num_classifiers=2)})
    found = {figure.name: figure for figure in statistics.run(quick(tmp_path))}
    assert found["one model, least coverage, n 10"].met
    assert found["two: any left out, n 20"].value <= 0.1
    assert any(name.startswith("5 draws, 25 shots, accuracy 0.96") for name in found)
    assert found["validation accuracy of the best of 16 trials: too high by, n 20"].value > 3
