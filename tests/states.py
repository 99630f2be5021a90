"""The state of a sweep of one small encoder, for tests of what its studies do with it: no Ray, no MLflow, no images."""

import inspect
import io
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from jobs import SMALL_CNN
from rich.console import Console

from raysweep.encoders.build import build_encoder
from raysweep.experiment.config import Experiment
from raysweep.images.cache import Cache
from raysweep.images.index import ImageIndex
from raysweep.results.progress import Progress
from raysweep.results.tracking import LoggedRun, Tracker
from raysweep.storage.paths import SweepPaths
from raysweep.sweep.state import SweepState
from raysweep.training.evaluation import evaluate_test
from raysweep.worker.job import TestResult

CACHE = Cache("features-1", "features-1/a-pass", 120, (), 2.0, 10**9, 0, made_now=True)


class FakeRecorder:
    """Remembers what was sent; every run is created once, and every model has a URI."""

    is_lost = False

    def __init__(self):
        self.sent, self.runs = [], {}

    def call(self, method, key=None, *arguments):
        if method is Tracker.save_view:
            return "/view"
        assert method is Tracker.start_run
        inspect.signature(method).bind(None, key, *arguments)
        self.sent.append((method, key, *arguments))
        created = key not in self.runs
        return self.runs.setdefault(key, f"run{len(self.runs)}"), created

    def wait(self):
        pass

    def send(self, method, *arguments):
        inspect.signature(method).bind(None, *arguments)
        self.sent.append((method, *arguments))
        answer = Future()
        if method is Tracker.log_outcome:
            answer.set_result(LoggedRun(arguments[0], "models:/m-1"))
        return answer

    def of(self, method):
        return [arguments for sent, *arguments in self.sent if sent is method]


def make_index(num_per_class=40):
    """Three classes; of each one's rows half are train, a quarter validation, a quarter test."""
    labels, quarter = np.repeat(np.arange(3, dtype=np.int32), num_per_class), num_per_class // 4
    splits = (["train"] * 2 * quarter + ["validation"] * quarter + ["test"] * quarter) * 3
    hashes = pa.array([bytes(32)] * len(labels), pa.binary(32))
    table = pa.table({"row_id": np.arange(len(labels)), "label": labels, "split": splits, "content_hash": hashes})
    return ImageIndex(table, ("a", "b", "c"), (), (), len(labels), "fingerprint")


def make_state(storage, recorder=None, **keys):
    """The state of a sweep, as a resumed invocation would have it again.

    Args:
        storage: where it is kept.
        recorder: of its MLflow runs.
        keys: of the experiment.
    """
    experiment = Experiment.model_validate(
        {"name": "x", "data": {"source": "s"}, "encoders": [{"type": "dinov2"}], **keys}
    )
    state = SweepState(
        experiment,
        SweepPaths(str(storage), "x"),
        make_index(),
        recorder or FakeRecorder(),
        Progress(Console(file=io.StringIO(), width=200)),
        ray=None,
        run_id="sweep-run",
    )
    # A small encoder stands in for the one that would be downloaded.
    cnn = build_encoder(SMALL_CNN, 0)
    state.encoders["dinov2"] = SimpleNamespace(spec=cnn.spec, model=cnn, weights="weights", precision="fp32")
    return state


def text_of(state):
    """What a person was told."""
    return state.progress.console.file.getvalue()


def make_tested(**changes):
    """What came of a test in which 24 of 30 rows were right."""
    labels = np.arange(30) % 3
    logits = np.eye(3, dtype=np.float32)[np.where(np.arange(30) < 24, labels, (labels + 1) % 3)]
    return TestResult(**({"metrics": evaluate_test(logits, labels)} | changes))
