"""What runs in the actors of a pass, in this process and without Ray."""

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from raysweep.encoders import compiled
from raysweep.encoders.build import build_encoder
from raysweep.encoders.compiled import MIN_IMAGES, CompiledEncoder
from raysweep.images import features, pass_tasks, passes
from raysweep.images.blocks import tensor_column
from raysweep.images.features import load_features
from raysweep.images.pass_tasks import EncoderActor, IndexReference, PassJob, PassTarget, WaitingTime
from raysweep.images.pixels import Geometry
from raysweep.images.task_reports import Tally, build_reports

BATCH_SIZE, NUM_ROWS = 4, 11  # two full batches, and one of three
BAD = 2


@pytest.fixture(scope="module")
def encoder():
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    return build_encoder({"type": "dinov2", "use_pretrained": False, "image_size": 32, "config": tiny}, 0)


@pytest.fixture
def decoded(encoder):
    """What `decode_block` returns for a block with one bad row."""
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 32, 32, 3), np.uint8)
    errors = pa.array([None if row != BAD else "broken" for row in range(NUM_ROWS)], pa.string())
    reports = build_reports(np.arange(NUM_ROWS), errors, np.zeros(2))
    return reports.append_column("pixels_0", tensor_column(pixels))


@pytest.fixture
def make_actor(monkeypatch, tmp_path, encoder):
    """Makes an actor of a pass over many or few images. What GPUs get, it gets on a CPU."""
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(compiled, "COMPILED_ON", "cpu")
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setitem(features.ENCODER_BATCH, ("cpu", "fp32"), BATCH_SIZE)
    monkeypatch.setattr(pass_tasks.torch, "set_num_threads", lambda _number: None)
    weights = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}

    def make(name, num_images):
        geometry = Geometry.of(encoder.preprocessing, for_training=False)
        folder = tmp_path / name
        folder.mkdir()
        target = PassTarget(str(folder), geometry, encoder=encoder.spec, weights=weights)
        return EncoderActor(PassJob("key", IndexReference(None, None), (target,), 1, num_images))

    torch.compiler.reset()
    yield make
    torch.compiler.reset()


def features_in(tmp_path, name):
    rows = np.array([row for row in range(NUM_ROWS) if row != BAD])
    return load_features(str(tmp_path / name), rows, ["cls", "mean"])


def test_a_long_pass_is_compiled_and_its_features_are_those_of_a_short_one(make_actor, decoded, tmp_path):
    short, long = make_actor("short", MIN_IMAGES - 1), make_actor("long", MIN_IMAGES)
    assert not isinstance(short.encoders[0], CompiledEncoder)
    assert isinstance(long.encoders[0], CompiledEncoder)
    assert long.encoders[0].batch_size == BATCH_SIZE
    tallies = []
    for actor in (short, long):
        tallies.append(Tally(num_caches=1))
        tallies[-1].add(actor(decoded))
        assert tallies[-1].warnings == []
    assert tallies[0].files[0].keys() == tallies[1].files[0].keys()
    for part, values in features_in(tmp_path, "short").items():
        torch.testing.assert_close(features_in(tmp_path, "long")[part], values, rtol=2e-3, atol=2e-3)


def test_an_encoder_that_cannot_be_compiled_says_so_once_and_encodes(make_actor, decoded, tmp_path, monkeypatch):
    def backend(_graph, _example_inputs):
        raise RuntimeError("no C compiler")

    make_actor("plain", 0)(decoded)
    monkeypatch.setattr(compiled, "BACKEND", backend)
    actor, tally = make_actor("failed", MIN_IMAGES), Tally(num_caches=1)
    reports = [actor(decoded), actor(decoded)]
    assert [any(texts or () for texts in one["warnings"].to_pylist()) for one in reports] == [True, False]
    for one in reports:
        tally.add(one)
    (warning,) = tally.warnings
    assert warning.startswith("warning: dinov2: it is not compiled")
    assert "no C compiler" in warning
    for part, values in features_in(tmp_path, "plain").items():
        assert torch.equal(features_in(tmp_path, "failed")[part], values)


def test_time_without_any_call_is_told_from_time_with_one_or_more(monkeypatch):
    clock = iter([10, 12, 15, 16, 20, 23, 25, 28])
    monkeypatch.setattr(pass_tasks.time, "perf_counter", lambda: float(next(clock)))
    waiting = WaitingTime()
    with waiting.call():  # 10 to 20
        with waiting.call():  # 12 to 15
            pass
        assert waiting.take().tolist() == [0, 6]  # at 16
    with waiting.call():  # 23 to 28
        assert waiting.take().tolist() == [3, 6]  # at 25


def test_waiting_is_part_of_the_reports(make_actor, decoded):
    actor, tally = make_actor("told", 0), Tally(num_caches=1)
    for _ in range(2):
        tally.add(actor(decoded))
    waiting, working = tally.encoder_seconds
    assert waiting > 0
    assert working > 0


@pytest.mark.parametrize("num_rows", [1_000, 128_001, 200_000, 300_000, 10**6, 10**8])
def test_blocks_add_up_to_full_batches_of_a_gpu(num_rows):
    size, batch_size = passes._block_size(num_rows), features.ENCODER_BATCH["cuda", "bf16"]
    assert passes.GPU_BLOCK % batch_size == 0
    assert passes.GPU_BLOCK % size == 0 or size % passes.GPU_BLOCK == 0
