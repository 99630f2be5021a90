import math

import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    top_k_accuracy_score,
)
from torch import nn
from torch.nn import functional as F

from raysweep.images.disk_rows import DiskRows
from raysweep.training import population
from raysweep.training.distributed import seeded_generator
from raysweep.training.metrics import MetricSums, validation_metrics
from raysweep.training.population import FeatureSet, Subsets, feature_statistics, train_population

NUM_CLASSES, BATCH_SIZE, SEED = 4, 16, 11
SOURCES = {"cls": ("cls",), "cls+mean": ("cls", "mean")}
SETTINGS = [
    {"learning_rate": 1e-2, "weight_decay": 1e-4, "epochs": 3, "features": "cls", "normalize": "none"},
    {"learning_rate": 3e-2, "weight_decay": 1e-1, "epochs": 7, "features": "cls", "normalize": "standardize"},
    {"learning_rate": 1e-3, "weight_decay": 1e-2, "epochs": 5, "features": "cls+mean", "normalize": "l2"},
    {"learning_rate": 1e-1, "weight_decay": 0.0, "epochs": 1, "features": "cls", "normalize": "none"},
    {"learning_rate": 5e-3, "weight_decay": 5.0, "epochs": 9, "features": "cls", "normalize": "none"},
    {"learning_rate": 1e-2, "weight_decay": 1e-6, "epochs": 9, "features": "cls+mean", "normalize": "standardize"},
    {"learning_rate": 1e-1, "weight_decay": 1e-3, "epochs": 4, "features": "cls+mean", "normalize": "l2"},
    {"learning_rate": 2e-2, "weight_decay": 1e-1, "epochs": 7, "features": "cls", "normalize": "standardize"},
]


def features(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    # Every class occurs: the gradient of an absent one may cancel to rounding errors, and Adam would step along these.
    labels = torch.randperm(num_rows, generator=generator) % NUM_CLASSES
    centres = torch.randn(2, NUM_CLASSES, 12, generator=torch.Generator().manual_seed(0))
    cls = centres[0][labels] + torch.randn(num_rows, 12, generator=generator)
    mean = 5 + 3 * centres[1][labels, :7] + torch.randn(num_rows, 7, generator=generator)
    return FeatureSet({"cls": cls, "mean": mean}, labels)


def train(settings, num_rows=53, **more):
    arguments = {"sources": SOURCES, "num_classes": NUM_CLASSES, "batch_size": BATCH_SIZE, "seed": SEED} | more
    return train_population(features(num_rows, 1), features(29, 2), settings, **arguments)


def inputs_alone(train, rows, setting):
    """Normalised inputs, written out again so that nothing of the population's is relied on."""
    cls_only = setting["features"] == "cls"
    train, rows = (
        s.parts["cls"] if cls_only else torch.cat([s.parts["cls"], s.parts["mean"]], 1) for s in (train, rows)
    )
    if setting["normalize"] == "l2":
        return rows / rows.norm(dim=1, keepdim=True)
    if setting["normalize"] == "standardize":
        return (rows - train.mean(0)) / train.std(0, correction=0)
    return rows


def train_alone(setting, num_rows):
    """One head by torch's own layer, optimiser and schedule; the bias takes no weight decay."""
    train, validation = features(num_rows, 1), features(29, 2)
    inputs, held_out = (inputs_alone(train, rows, setting) for rows in (train, validation))
    layer = nn.Linear(inputs.shape[1], NUM_CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setting["learning_rate"], weight_decay=setting["weight_decay"])
    num_steps = setting["epochs"] * math.ceil(num_rows / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (1 + math.cos(math.pi * s / num_steps)) / 2)
    history = []
    for epoch in range(setting["epochs"]):
        losses = []
        order = torch.randperm(num_rows, generator=seeded_generator(SEED, epoch))
        for start in range(0, num_rows, BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            loss = F.cross_entropy(layer(inputs[rows]), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += [loss.item()] * len(rows)
        with torch.no_grad():
            logits = layer(held_out)
        predicted = logits.argmax(1)
        history.append(
            {
                "train/loss": sum(losses) / num_rows,
                "val/loss": F.cross_entropy(logits, validation.labels).item(),
                "val/accuracy": accuracy_score(validation.labels, predicted),
                "val/macro_f1": f1_score(validation.labels, predicted, average="macro"),
                "val/balanced_accuracy": balanced_accuracy_score(validation.labels, predicted),
                "val/top_k_accuracy": top_k_accuracy_score(validation.labels, logits, k=NUM_CLASSES - 1),
                "val/brier": brier_score_loss(validation.labels, logits.double().softmax(1)),
            }
        )
    return layer, history


def metrics_of(history):
    return [{name: value for name, value in epoch.items() if not name.startswith("time/")} for epoch in history]


def assert_same_history(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(metrics_of(found), metrics_of(expected), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("num_rows", [53, 48, 14])
def test_a_population_equals_each_head_trained_alone(num_rows):
    for result, setting in zip(train(SETTINGS, num_rows), SETTINGS, strict=True):
        layer, history = train_alone(setting, num_rows)
        assert result.setting == setting
        torch.testing.assert_close(result.head.weight.data, layer.weight.data, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.head.bias.data, layer.bias.data, rtol=1e-4, atol=1e-4)
        assert_same_history(result.history, history)


def few_shot_subsets():
    """Three draws of 21 train and 13 validation rows, all different."""
    generator = torch.Generator().manual_seed(4)
    draws = [[torch.randperm(n, generator=generator)[:size] for _ in range(3)] for n, size in ((53, 21), (29, 13))]
    return Subsets(*(torch.stack(rows) for rows in draws))


def evaluated(result, head, rows):
    """Validation metrics of a head over raw features."""
    logits = head(torch.cat([rows.parts[part] for part in SOURCES[result.setting["features"]]], dim=1))
    sums = MetricSums(1, NUM_CLASSES)
    sums.add(logits.detach()[:, None], rows.labels)
    return validation_metrics(sums.compute())


def sliced(features, rows):
    return FeatureSet({name: part[rows] for name, part in features.parts.items()}, features.labels[rows])


def test_a_subset_gives_what_its_rows_alone_give():
    subsets = few_shot_subsets()
    together = train(SETTINGS, subsets=subsets)
    assert len({result.heads[0].weight.sum().item() for result in together}) == len(SETTINGS)
    for index, (rows, held_out) in enumerate(zip(subsets.train, subsets.validation, strict=True)):
        arguments = {"sources": SOURCES, "num_classes": NUM_CLASSES, "batch_size": BATCH_SIZE, "seed": SEED}
        sets = sliced(features(53, 1), rows), sliced(features(29, 2), held_out)
        for one, alone in zip(together, train_population(*sets, SETTINGS, **arguments), strict=True):
            assert len(one.heads) == 3
            for name, tensor in alone.head.state_dict().items():
                torch.testing.assert_close(one.heads[index].state_dict()[name], tensor, rtol=1e-5, atol=1e-5)
            last = {name: value for name, value in alone.history[-1].items() if name.startswith("val/")}
            assert evaluated(one, one.heads[index], sets[1]) == pytest.approx(last, abs=1e-5)


def test_a_history_is_the_mean_over_the_subsets():
    subsets = few_shot_subsets()
    together = train(SETTINGS, subsets=subsets)
    apart = [train(SETTINGS, subsets=Subsets(subsets.train[[i]], subsets.validation[[i]])) for i in range(3)]
    for one, *alone in zip(together, *apart, strict=True):
        for epoch, *epochs in zip(metrics_of(one.history), *(metrics_of(a.history) for a in alone), strict=True):
            assert epoch == pytest.approx({key: sum(e[key] for e in epochs) / 3 for key in epoch}, abs=1e-5)
    held_out = [sliced(features(29, 2), rows) for rows in subsets.validation]
    finals = [evaluated(together[0], *each) for each in zip(together[0].heads, held_out, strict=True)]
    assert len({values["val/loss"] for values in finals}) == 3
    last = {name: value for name, value in together[0].history[-1].items() if name in finals[0]}
    assert last == pytest.approx({name: sum(values[name] for values in finals) / 3 for name in last}, abs=1e-5)


@pytest.mark.parametrize("subsets", [None, few_shot_subsets()])
@pytest.mark.parametrize("limit", ["PREPARED_BYTES", "BLOCK_BYTES", "LOGITS_BYTES"])
def test_how_much_is_held_at_once_does_not_matter(monkeypatch, limit, subsets):
    expected = train(SETTINGS, subsets=subsets)
    monkeypatch.setattr(population, limit, 1)
    assert_same_results(train(SETTINGS, subsets=subsets), expected)


@pytest.mark.parametrize("subsets", [None, few_shot_subsets()])
@pytest.mark.parametrize("prepared_bytes", [0, population.PREPARED_BYTES])
def test_features_on_disk_give_what_those_in_memory_give(tmp_path, monkeypatch, subsets, prepared_bytes):
    monkeypatch.setattr(population, "PREPARED_BYTES", prepared_bytes)
    monkeypatch.setattr(population, "BLOCK_BYTES", 2 * 4 * BATCH_SIZE * 100)
    sets = [features(53, 1), features(29, 2)]
    half = [FeatureSet({n: part.half() for n, part in s.parts.items()}, s.labels) for s in sets]
    disk = [
        FeatureSet({n: on_disk(tmp_path / f"{index}-{n}", part) for n, part in s.parts.items()}, s.labels)
        for index, s in enumerate(half)
    ]
    arguments = {"sources": SOURCES, "num_classes": NUM_CLASSES, "batch_size": BATCH_SIZE, "seed": SEED}
    found, expected = (train_population(*s, SETTINGS, subsets=subsets, **arguments) for s in (disk, half))
    assert_same_results(found, expected)


def on_disk(path, part):
    return DiskRows.create(path, *part.shape, [(torch.arange(len(part)).numpy(), part.numpy())])


def assert_same_results(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_same_history(one.history, other.history)
        assert len(one.heads) == len(other.heads)
        for head, expected_head in zip(one.heads, other.heads, strict=True):
            torch.testing.assert_close(head.state_dict(), expected_head.state_dict(), rtol=1e-5, atol=1e-5)


def test_the_order_of_the_settings_does_not_matter():
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = train([SETTINGS[index] for index in order])
    for position, expected in zip(order, shuffled, strict=True):
        alone = train(SETTINGS)[position] if position == order[0] else train([SETTINGS[position]])[0]
        assert alone.setting == expected.setting
        torch.testing.assert_close(alone.head.weight.data, expected.head.weight.data, rtol=1e-5, atol=1e-5)
        assert_same_history(alone.history, expected.history)


def test_a_head_over_raw_features_gives_the_last_epoch_again():
    validation = features(29, 2)
    for result in train(SETTINGS):
        last = {name: value for name, value in result.history[-1].items() if name.startswith("val/")}
        assert evaluated(result, result.head, validation) == pytest.approx(last, abs=1e-5)


def test_heads_learn():
    settings = [{**SETTINGS[5], "epochs": 20}]
    (result,) = train(settings)
    assert result.history[-1]["val/accuracy"] > 0.9
    assert result.history[-1]["train/loss"] < 0.3 * result.history[0]["train/loss"]


def test_a_diverging_head_leaves_its_neighbours_alone():
    wild = {**SETTINGS[4], "learning_rate": 1e38, "weight_decay": 10.0}
    lone, (kept, lost) = train([SETTINGS[4]])[0], train([SETTINGS[4], wild])
    torch.testing.assert_close(kept.head.weight.data, lone.head.weight.data, rtol=1e-5, atol=1e-5)
    assert_same_history(kept.history, lone.history)
    assert len(lost.history) == wild["epochs"]
    # Not the share of class 0, which is what argmax makes of NaN.
    assert math.isnan(lost.history[-1]["val/accuracy"])
    assert math.isnan(lost.history[-1]["val/macro_f1"])


def test_the_seed_decides_the_batches():
    first, again, other = (train(SETTINGS[:1], seed=seed)[0].head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_half_precision_features_are_trained_on_in_single():
    half = [FeatureSet({n: p.half() for n, p in s.parts.items()}, s.labels) for s in (features(53, 1), features(29, 2))]
    whole = [FeatureSet({n: p.float() for n, p in s.parts.items()}, s.labels) for s in half]
    arguments = {"sources": SOURCES, "num_classes": NUM_CLASSES, "batch_size": BATCH_SIZE, "seed": SEED}
    for low, high in zip(*(train_population(*sets, SETTINGS, **arguments) for sets in (half, whole)), strict=True):
        assert low.head.weight.dtype == torch.float32
        assert torch.equal(low.head.weight, high.head.weight)


def test_statistics_are_those_of_the_train_rows():
    train = features(9000, 1)
    inputs = torch.cat([train.parts["cls"], train.parts["mean"]], dim=1)
    mean, scale = feature_statistics(train, ("cls", "mean"), torch.arange(9000)[None])
    torch.testing.assert_close(mean[0], inputs.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale[0], inputs.std(0, correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.3, -700.1, 1e6 + 0.1])
def test_a_constant_feature_keeps_a_scale_of_one(constant):
    train = FeatureSet({"cls": torch.full((5001, 1), constant)}, torch.zeros(5001, dtype=torch.long))
    _, scale = feature_statistics(train, ("cls",), torch.arange(5001)[None])
    assert scale.tolist() == [[1.0]]
