"""Several nodes, which come and go: real Ray nodes of this machine, and drivers in processes of their own."""

import json
import os
import shutil
import subprocess
import textwrap
import time
from contextlib import contextmanager

import pytest
from nodes import running_nodes

pytestmark = pytest.mark.ray

NUM_IMAGES = 64

PASS = """
    import io, json, sys, time
    from pathlib import Path
    import numpy as np, pyarrow as pa, ray
    from PIL import Image
    from raysweep.cluster.session import present_resources
    from raysweep.encoders.build import build_encoder
    from raysweep.images.features import FeatureRequest, load_features
    from raysweep.images.pass_processes import PassProcesses
    from raysweep.images.passes import build_caches
    from raysweep.images.index import ImageIndex

    folder, marks, count, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

    def slow_down():
        from raysweep.images import pass_tasks
        encode = pass_tasks.encode

        def slowly(*arguments):
            time.sleep(seconds)
            with open(f"{marks}/{ray.get_runtime_context().get_node_id()}", "a") as mark:
                mark.write("x")
            return encode(*arguments)

        pass_tasks.encode = slowly

    def image(number):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    ray.init(runtime_env={"worker_process_setup_hook": slow_down}, log_to_driver=False, logging_level="ERROR")
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    encoder = build_encoder({"type": "dinov2", "use_pretrained": False, "config": tiny, "image_size": 32}, seed=0)
    ids = np.arange(count)
    columns = {"row_id": ids, "path": [f"{n}.png" for n in ids], "position": np.full(count, -1),
               "image": pa.array([image(n) for n in ids], pa.large_binary()), "label": pa.array(ids % 2, pa.int32()),
               "split": ["train"] * count, "content_hash": [b"%d" % n for n in ids]}
    index = ImageIndex(pa.table(columns), ("a", "b"), (), (), count, "fingerprint")
    weights = ray.put({name: tensor.numpy() for name, tensor in encoder.state_dict().items()})
    present = present_resources()
    print("begins", flush=True)
    (cache,) = build_caches(
        [FeatureRequest(folder, encoder.spec, weights, "fp32")], index, num_gpus=0,
        processes=PassProcesses(sum(present.cpus_by_node), on_cluster=True),
        on_progress=lambda done, _: print("done", done),
    )
    features = load_features(cache.rows, ids, ["cls"])["cls"]
    print("result", json.dumps({"num_rows": cache.num_rows, "distinct": len(np.unique(features.numpy(), axis=0))}))
"""

GROUPS = """
    import json, sys, time
    from pathlib import Path
    from types import SimpleNamespace
    from raysweep.cluster.session import RaySession
    from raysweep.experiment.modes import MODES
    from raysweep.experiment.sections import ResourcesConfig
    from raysweep.sweep import tune_run
    from raysweep.worker.job import TrainWork, TrialResult, TrialSpec, WorkReport, to_tune

    class Group:
        name, mode = "a", MODES["linear_probe"]

        def __init__(self, count, num_nodes, seconds):
            self.count, self.num_nodes, self.seconds = count, num_nodes, seconds
            self.next, self.taken, self.num_running = 0, {}, 0

        def next_work(self):
            # At least `count` pieces, and more until so many nodes have worked: some take long to start.
            is_enough = self.next >= self.count and len(set(self.taken.values())) >= self.num_nodes
            if is_enough or self.next == 20:
                return None
            self.next += 1
            return TrainWork("a", time.time(), (TrialSpec("a", self.next - 1, {}, None, ""),))

        def take(self, work, report):
            number = work.trials[0].number
            self.taken[number] = report.error or report.trials[0].checkpoint
            print("taken", number)

        def build_job(self, num_side_by_side):
            return SimpleNamespace(resources=ResourcesConfig(), use_gpu=False, seconds=self.seconds)

    def run_work(config, jobs):
        import ray
        from ray import tune
        time.sleep(float(jobs["a"].seconds))
        node = ray.get_runtime_context().get_node_id()  # in the place of what a trial leaves
        trials = [TrialResult("a", trial.number, {}, checkpoint=node) for trial in config["work"].trials]
        tune.report(to_tune(WorkReport(tuple(trials))))

    tune_run.run_work = run_work
    session, group = RaySession(verbose=False), Group(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    print("up", session.resources.num_cpus)
    tune_run.run_groups(
        [group], Path(sys.argv[1]), num_groups=1, num_runs=lambda: session.resources_now.num_cpus,
        max_failures=ResourcesConfig().max_failures,
    )
    session.close()
    print("result", json.dumps(group.taken))
"""

WAIT = """
    import json
    from raysweep.cluster.nodes import wait_for_nodes
    from raysweep.cluster.session import RaySession
    from raysweep.experiment.sections import ResourcesConfig

    session = RaySession(verbose=False)
    config = ResourcesConfig(num_workers=2, wait_for_nodes_s=60)
    present = wait_for_nodes(config, session, lambda text: print("said", text))
    session.close()
    print("result", json.dumps(present.num_cpus))
"""


@pytest.fixture(scope="module")
def head():
    with running_nodes(0) as found:
        yield found


@pytest.fixture
def nodes(head):
    """A head with one CPU, to which a test may add nodes."""
    yield head
    for number in range(1, len(head.processes)):
        head.kill(number)
    head.wait_for(1)


@contextmanager
def driver(nodes, code, *arguments):
    process = nodes.start_driver(textwrap.dedent(code), *map(str, arguments))
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def read_until(process, word):
    """Reads what a driver prints until a line begins with a word; returns the rest of that line."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise AssertionError("".join(seen)[-3000:])


def test_a_node_that_joins_takes_part_in_the_pass(nodes, tmp_path):
    (tmp_path / "marks").mkdir()
    with driver(nodes, PASS, tmp_path / "cache", tmp_path / "marks", 24 * NUM_IMAGES, 1.2) as process:
        read_until(process, "begins")
        nodes.add()
        found = json.loads(read_until(process, "result"))
    shares = [len(path.read_text()) for path in (tmp_path / "marks").iterdir()]
    assert len(shares) == 2, "both nodes have encoded; Ray Data looks for new ones every ten seconds"
    assert found == {"num_rows": 24 * NUM_IMAGES, "distinct": 24 * NUM_IMAGES}


def test_a_pass_survives_the_loss_of_a_node(nodes, tmp_path):
    (tmp_path / "marks").mkdir()
    lost = nodes.add()
    nodes.wait_for(2)
    with driver(nodes, PASS, tmp_path / "cache", tmp_path / "marks", 16 * NUM_IMAGES, 0.7) as process:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "marks").iterdir())) < 2:
            assert time.monotonic() < deadline, "the second node never began"
            time.sleep(0.1)
        nodes.kill(lost)
        found = json.loads(read_until(process, "result"))
    assert found == {"num_rows": 16 * NUM_IMAGES, "distinct": 16 * NUM_IMAGES}


def test_a_node_that_joins_gets_trials(nodes, tmp_path):
    # Tune hands waiting work to a process that has come free, even while one on another node starts for it: work must
    # take longer than that.
    with driver(nodes, GROUPS, tmp_path / "tune", 2, 2, 15) as process:
        read_until(process, "taken")
        nodes.add()
        taken = json.loads(read_until(process, "result"))
    assert sorted(map(int, taken)) == list(range(len(taken)))
    assert len(set(taken.values())) == 2, "both nodes have worked"


def test_the_work_of_a_lost_node_is_done_again(nodes, tmp_path):
    lost = nodes.add()
    nodes.wait_for(2)
    with driver(nodes, GROUPS, tmp_path / "tune", 8, 1, 1.5) as process:
        assert read_until(process, "up") == "2"
        for _ in range(3):
            read_until(process, "taken")
        nodes.kill(lost)
        taken = json.loads(read_until(process, "result"))
    assert sorted(map(int, taken)) == list(range(8))
    assert all(len(node) == len("node") * 14 for node in taken.values()), taken  # node ids, and no reasons


def test_a_sweep_waits_for_nodes_where_it_is_told_to(nodes):
    with driver(nodes, WAIT) as process:
        said = read_until(process, "said")
        assert said.startswith("waiting for nodes, at most 60 s: resources: one training run needs 2 CPUs"), said
        nodes.add()
        assert json.loads(read_until(process, "result")) == 2


ALONE = """
    import os
    del os.environ["RAY_ADDRESS"]
    from raysweep.cluster.session import RaySession
    from raysweep.cluster.resources import local_resources

    session = RaySession(verbose=False)
    print("result", session.resources.num_nodes, session.resources.num_cpus == max(2, local_resources().num_cpus))
    session.close()
"""


def test_a_sweep_of_this_machine_takes_no_notice_of_a_cluster_on_it(nodes):
    with driver(nodes, ALONE) as process:
        assert read_until(process, "result") == "1 True"


def may_unshare():
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0


RUN = "import sys; from raysweep.run import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.skipif(not may_unshare(), reason="hiding a folder from a node needs root and mount namespaces")
@pytest.mark.parametrize("hidden", ["storage", "data.source"])
def test_what_a_node_cannot_see_is_refused_before_anything_starts(nodes, tmp_path, hidden):
    from PIL import Image
    from sklearn.datasets import load_digits

    runs, images = tmp_path / "runs", tmp_path / "images"
    runs.mkdir()
    digits = load_digits()
    for number in range(60):
        folder = images / str(digits.target[number] % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15).astype("uint8")).save(folder / f"{number}.png")
    (tmp_path / "x.yaml").write_text(
        f"storage: {runs}\ndata: {{source: {images}}}\nencoders: [{{type: stacked_cnn, image_size: 32}}]\n"
        f"tracking: {{uri: 'sqlite:///{tmp_path}/mlflow.db'}}\n"
    )
    place = {"storage": runs, "data.source": images}[hidden]
    script = f'mount -t tmpfs none {place} && exec "$@"'
    nodes.add(wrapper=("unshare", "-m", "sh", "-c", script, "sh"))
    nodes.wait_for(2)
    with driver(nodes, RUN, tmp_path / "x.yaml") as process:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 1
    assert f"error: {hidden}: '{place}' is not seen by 1 of 2 nodes (" in said
    assert not list(runs.glob("x/studies")), "nothing has begun"
