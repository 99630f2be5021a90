"""Jobs as the driver builds them, for tests that need one: small, on CPUs, with whatever a test changes."""

import time

import numpy as np

from raysweep.encoders.build import build_encoder
from raysweep.experiment.modes import MODES
from raysweep.experiment.sections import ResourcesConfig
from raysweep.images.rows import SplitRows
from raysweep.training.loop import LoopOptions
from raysweep.training.ranking import Ranking
from raysweep.worker.job import Job, StudySpec, TestWork, TrainWork, TrialResult, TrialSpec

SMALL_CNN = {"type": "stacked_cnn", "config": {"channels": [4]}, "image_size": 16}
SETTING = {"learning_rate": 1e-3, "epochs": 2, "weight_decay": 0.0}


def make_loop(**changes):
    return LoopOptions(**({"batch_size": 4, "seed": 0, "ranking": Ranking(), "patience": 5} | changes))


def make_rows(num_rows=12, num_classes=3):
    """The same number of rows in each split, of classes in turn."""
    splits = enumerate(("train", "validation", "test"))
    return {
        split: SplitRows(np.arange(num_rows) + place * num_rows, np.arange(num_rows) % num_classes)
        for place, split in splits
    }


def make_job(mode="linear_probe", studies=("study",), folder="folder", resources=None, loop=None, **changes):
    """A job of one group.

    Args:
        mode: name of the mode.
        studies: names, or StudySpec where a test needs more than a name.
        folder: that the studies' folders lie in.
        resources: keys of ResourcesConfig.
        loop: fields of LoopOptions.
        changes: further fields of Job.
    """
    specs = [one if isinstance(one, StudySpec) else StudySpec(one, f"{folder}/{one}", None) for one in studies]
    values = {
        "mode": MODES[mode],
        "studies": {spec.name: spec for spec in specs},
        "data_key": "key",
        "cache": "cache",
        "index": None,
        "rows": make_rows(),
        "num_classes": 3,
        "encoder": build_encoder(SMALL_CNN, seed=0).spec,
        "weights": None,
        "head": None,
        "resources": ResourcesConfig(**(resources or {})),
        "use_gpu": False,
        "num_threads": 1,
        "gradient_checkpointing": False,
        "compile": False,
        "loop": make_loop(**(loop or {})),
    }
    return Job(**(values | changes))


def make_trial(number=0, study="study", setting=None, continues=None, stop_file="folder/stop"):
    return TrialSpec(study, number, SETTING | (setting or {}), continues, stop_file)


def make_result(trial=None, accuracy=0.5, loss=None, num_epochs=1, **changes):
    """The result of a trial that got the same in every epoch.

    Args:
        trial: TrialSpec; one of the study `study` when left out.
        accuracy: `val/accuracy`.
        loss: `val/loss`; if left out, the lower the higher the accuracy is.
        num_epochs: epochs that it trained for.
        changes: fields of TrialResult.
    """
    trial = trial or make_trial()
    epoch = {"val/accuracy": accuracy, "val/loss": 1.5 - accuracy if loss is None else loss, "time/epoch_s": 0.1}
    values = {
        "study": trial.study,
        "number": trial.number,
        "setting": trial.setting,
        "history": (epoch,) * num_epochs,
        "final": epoch,
        "best_epoch": num_epochs - 1,
        "train_seconds": 3.0,
        "images_per_second": 7.0,
        "peak_memory_bytes": 5,
    }
    return TrialResult(**(values | changes))


def train_work(*trials, group="study", micro_batch_size=None):
    return TrainWork(group, time.time(), trials or (make_trial(),), micro_batch_size)


def test_work(group="study", checkpoints=None, baselines=()):  # noqa: PT028  # not a test, as __test__ says
    return TestWork(group, time.time(), checkpoints or {}, tuple(baselines))


test_work.__test__ = False
