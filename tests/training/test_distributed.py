"""Several workers must give what one gives: real processes over gloo, found through a file, no ports."""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raysweep.encoders.base import Encoder
from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.experiment.metrics import VALIDATION_METRICS
from raysweep.training import distributed
from raysweep.training.augment import Augmentation
from raysweep.training.checkpoint import load_checkpoint
from raysweep.training.distributed import copy_from_first, own_rows, rank, sum_over_workers, world_size
from raysweep.training.loop import LoopOptions, evaluate_classifier, train_classifier
from raysweep.training.metrics import MetricSums
from raysweep.training.optimizer import freeze_unused_parameters
from raysweep.training.pixel_rows import PixelSet, ResidentPixels
from raysweep.training.population import FeatureSet, train_population
from raysweep.training.ranking import Ranking

pytestmark = pytest.mark.process

WORLD_SIZES = (2, 3)
NUM_ROWS, BATCH_SIZE, NUM_CLASSES = 25, 8, 3  # the last batch has one row, fewer than there are workers
SETTINGS = [
    {"learning_rate": 1e-2, "weight_decay": 1e-2, "epochs": 4, "features": "cls", "normalize": "standardize"},
    {"learning_rate": 3e-2, "weight_decay": 0.1, "epochs": 2, "features": "cls", "normalize": "standardize"},
    {"learning_rate": 1e-1, "weight_decay": 1e-4, "epochs": 3, "features": "cls", "normalize": "l2"},
]
AUGMENTATION = Augmentation(min_crop_scale=0.5, horizontal_flip=True)
EVERYTHING = {
    "augmentation": replace(AUGMENTATION, mixup=0.4, cutmix=1.0),
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "micro_batch_size": 2,
}
CLASSIFIERS = {
    "plain": ("dinov2", {}, NUM_ROWS),
    "augmented": ("dinov2", {"augmentation": AUGMENTATION}, NUM_ROWS),
    "everything": ("dinov2", EVERYTHING, NUM_ROWS),
    # A last batch of seven, so that every worker ends with batch-norm statistics of its own.
    "batch_norm": ("stacked_cnn", {}, NUM_ROWS - 2),
    "batch_norm_everything": ("stacked_cnn", EVERYTHING, NUM_ROWS - 2),
}


def rows(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_CLASSES, (num_rows,), generator=generator)
    features = torch.randn(num_rows, 10, generator=generator) + labels[:, None]
    pixels = torch.randint(0, 180, (num_rows, 32, 32, 3), generator=generator)
    pixels += 50 * nn.functional.one_hot(labels, NUM_CLASSES)[:, None, None]
    return FeatureSet({"cls": features}, labels), PixelSet(ResidentPixels(pixels.to(torch.uint8)), labels)


def options(more):
    return LoopOptions(BATCH_SIZE, 7, Ranking("val/loss", "minimize"), patience=9, **more)


def make_model(kind) -> Classifier:
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config if kind == "dinov2" else {"channels": [4, 8]}
    block = {"type": kind, "use_pretrained": False, "image_size": 28, "config": config}
    encoder: Encoder = build_encoder(block, seed=0)
    source = next(iter(encoder.sources))
    model = Classifier(encoder, Head(encoder.num_features(source), NUM_CLASSES), source)
    model.to(memory_format=torch.channels_last)
    freeze_unused_parameters(model)
    return model


def heads(num_validation):
    found = train_population(
        rows(NUM_ROWS, 1)[0],
        rows(num_validation, 2)[0],
        SETTINGS,
        sources={"cls": ("cls",)},
        num_classes=NUM_CLASSES,
        batch_size=BATCH_SIZE,
        seed=3,
    )
    return [{"history": result.history, "weights": result.head.state_dict()} for result in found]


def trained(name, folder):
    kind, more, num_rows = CLASSIFIERS[name]
    model = make_model(kind)
    # Without find_unused_parameters: a parameter that gets no gradient on some worker would be an error.
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    setting = {"learning_rate": 3e-3, "weight_decay": 0.05, "epochs": 3, "layer_decay": 0.75}
    train, validation = rows(num_rows, 1)[1], rows(11, 2)[1]
    result = train_classifier(model, parallel, train, validation, setting, options(more), folder / name)
    return {"history": result.history, "weights": model.state_dict(), "best_epoch": result.best_epoch}


def counted(num_rows):
    """What all workers' metrics say of rows that each took its share of: row number n has a loss that only it has."""
    labels = torch.arange(num_rows) % NUM_CLASSES
    logits = torch.zeros(num_rows, 1, NUM_CLASSES)
    logits[:, 0, 0] = torch.arange(num_rows).float() / 10
    own = own_rows(torch.arange(num_rows))
    sums = MetricSums(1, NUM_CLASSES)
    sums.add(logits[own], labels[own])
    sums.compute()  # asking twice must not count twice
    return {name: values.item() for name, values in sums.compute().items()}


def everything(folder):
    copied = [torch.full((2,), float(rank())), torch.tensor(rank())]
    copy_from_first(copied)
    return {
        "place": (rank(), world_size()),
        "sum": sum_over_workers(torch.tensor(rank() + 1)).item(),
        "copied": [tensor.tolist() for tensor in copied],
        "counted": {num_rows: counted(num_rows) for num_rows in (1, 2, 11)},
        "heads": heads(11),
        "heads_few": heads(1),
        **{name: trained(name, folder) for name in CLASSIFIERS},
    }


def worker(index, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # All sizes in the same processes, since starting these and importing torch is what takes the time.
    for size in WORLD_SIZES:
        if index < size:
            method = f"file://{folder}/rendezvous-{size}"
            dist.init_process_group("gloo", init_method=method, rank=index, world_size=size)
            torch.save(everything(folder / f"world-{size}"), folder / f"{size}-{index}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    found = everything(tmp_path_factory.mktemp("alone"))
    torch.set_num_threads(before)
    return found


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """World size -> what each of its workers found."""
    folder = tmp_path_factory.mktemp("workers")
    # A spawned process imports this module by its name.
    root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, root)
    try:
        torch.multiprocessing.spawn(worker, (folder,), nprocs=max(WORLD_SIZES))
    finally:
        sys.path.remove(root)
    return {size: [torch.load(folder / f"{size}-{index}.pt") for index in range(size)] for size in WORLD_SIZES} | {
        "folder": folder
    }


def losses(history):
    measured = ("train/loss", "train/learning_rate", *VALIDATION_METRICS)
    return [{name: epoch[name] for name in measured if name in epoch} for epoch in history]


def assert_same_history(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(losses(found), losses(expected), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def assert_bit_equal(states):
    first, *others = states
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_collectives(workers, size):
    found = workers[size]
    assert [one["place"] for one in found] == [(index, size) for index in range(size)]
    assert {one["sum"] for one in found} == {size * (size + 1) // 2}
    assert all(one["copied"] == [[0.0, 0.0], 0] for one in found)


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_every_row_is_counted_once(workers, alone, size):
    for one in workers[size]:
        for num_rows, metrics in one["counted"].items():
            assert metrics == pytest.approx(alone["counted"][num_rows])
            assert metrics["num_rows"] == num_rows


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("key", ["heads", "heads_few"])
def test_a_population_does_not_depend_on_the_number_of_workers(workers, alone, size, key):
    for index, expected in enumerate(alone[key]):
        for one in workers[size]:
            assert_same_history(one[key][index]["history"], expected["history"])
            for name, tensor in one[key][index]["weights"].items():
                torch.testing.assert_close(tensor, expected["weights"][name], rtol=1e-4, atol=1e-4)
        assert_bit_equal([one[key][index]["weights"] for one in workers[size]])


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["plain", "augmented", "everything"])
def test_a_classifier_does_not_depend_on_the_number_of_workers(workers, alone, size, name):
    assert alone[name]["history"][-1]["train/loss"] < alone[name]["history"][0]["train/loss"]
    for one in workers[size]:
        assert_same_history(one[name]["history"], alone[name]["history"])
        assert one[name]["best_epoch"] == alone[name]["best_epoch"]


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_all_workers_end_with_the_same_classifier(workers, size, name):
    assert_bit_equal([one[name]["weights"] for one in workers[size]])
    assert all(losses(one[name]["history"]) == losses(workers[size][0][name]["history"]) for one in workers[size])


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_metrics_are_those_of_the_weights_that_are_kept(workers, size, name):
    tensors, metadata = load_checkpoint(workers["folder"] / f"world-{size}" / name / "best.safetensors")
    model = make_model(CLASSIFIERS[name][0])
    model.load_state_dict(tensors)
    again = evaluate_classifier(model, rows(11, 2)[1], options({}))
    assert again == pytest.approx({key: metadata["metrics"][key] for key in again}, abs=1e-5)
    assert metadata["epoch"] == workers[size][0][name]["best_epoch"]


def test_augmentation_changes_what_is_trained_on(alone):
    assert alone["plain"]["history"][-1]["train/loss"] != alone["augmented"]["history"][-1]["train/loss"]


def test_one_worker_is_the_identity(alone):
    assert alone["place"] == (0, 1)
    assert alone["sum"] == 1
    tensor = torch.ones(3)
    assert sum_over_workers(tensor) is tensor
    assert torch.equal(own_rows(torch.arange(5)), torch.arange(5))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [0, 1, 6, 20])
def test_shares_are_even_and_cover_every_row_once(monkeypatch, size, num_rows):
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    shares = []
    for index in range(size):
        monkeypatch.setattr(distributed, "rank", lambda index=index: index)
        shares.append(own_rows(torch.arange(num_rows) * 3).tolist())
    assert sorted(row for share in shares for row in share) == [3 * row for row in range(num_rows)]
    assert {len(share) for share in shares} <= {num_rows // size, math.ceil(num_rows / size)}


def test_numbers_depend_on_seed_and_epoch_alone():
    def drawn(seed, epoch):
        return torch.rand(4, generator=distributed.seeded_generator(seed, epoch)).tolist()

    first = drawn(1, 2)
    torch.rand(3)
    assert drawn(1, 2) == first
    assert len({tuple(drawn(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    assert len(drawn(2**32 - 1, 10_000)) == 4
