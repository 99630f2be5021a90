import copy
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.experiment.metrics import VALIDATION_METRICS
from raysweep.training.augment import Augmentation
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.training.distributed import seeded_generator
from raysweep.training.loop import (
    LoopOptions,
    evaluate_classifier,
    predict_logits,
    train_classifier,
)
from raysweep.training.optimizer import average_weights, build_optimizer, freeze_unused_parameters, warmup_cosine
from raysweep.training.pixel_rows import PixelSet, ResidentPixels
from raysweep.training.ranking import Ranking

NUM_CLASSES = 3
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "dinov2": TINY,
    "clip": TINY | {"intermediate_size": 32, "patch_size": 14},
    "siglip": TINY | {"intermediate_size": 32},
    "stacked_cnn": {"channels": [4, 8]},
}
SETTING = {"learning_rate": 3e-3, "epochs": 4, "weight_decay": 0.05, "layer_decay": 0.75}
AUGMENTATION = Augmentation(min_crop_scale=0.5, horizontal_flip=True)
LEAST_LOSS = Ranking("val/loss", "minimize")


def classifier(kind="dinov2", source=None, seed=0, **config):
    block = {"type": kind, "use_pretrained": False, "image_size": 28, "config": CONFIGS[kind] | config}
    encoder = build_encoder(block, seed=seed)
    source = source or next(iter(encoder.sources))
    model = Classifier(encoder, Head(encoder.num_features(source), NUM_CLASSES), source)
    model.to(memory_format=torch.channels_last)
    freeze_unused_parameters(model)
    return model


def pixel_set(num_rows, seed, side=32):
    """Noise that is brighter in one channel, which is its class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_CLASSES, (num_rows,), generator=generator)
    pixels = torch.randint(0, 180, (num_rows, side, side, 3), generator=generator)
    pixels += 50 * F.one_hot(labels, NUM_CLASSES)[:, None, None]
    return PixelSet(ResidentPixels(pixels.to(torch.uint8)), labels)


def options(**more):
    defaults = {"batch_size": 8, "seed": 7, "ranking": Ranking(), "patience": 100}
    return LoopOptions(**(defaults | more))


def train(model, folder, setting=None, on_epoch=lambda metrics: None, parallel=None, **more):
    train_set = pixel_set(21, 1, model.encoder.preprocessing.training_size[0])
    validation = pixel_set(13, 2, model.encoder.preprocessing.training_size[0])
    setting = SETTING | (setting or {})
    parallel = model if parallel is None else parallel
    return train_classifier(model, parallel, train_set, validation, setting, options(**more), folder, on_epoch)


def timeless(history):
    return [
        {n: v for n, v in epoch.items() if n not in ("time/epoch_s", "train/images_per_second")} for epoch in history
    ]


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def plain_rate(name, setting):
    """Learning rate and weight decay of a dinov2 parameter, by its name alone."""
    layer = re.search(r"encoder\.layer\.(\d+)|layers?\.(\d+)\.", name)
    depth = (
        3
        if name.startswith("head.")
        else 0
        if "embeddings" in name
        else 2
        if layer is None
        else 1 + int(layer.group(1) or layer.group(2))
    )
    rate = setting["learning_rate"] * setting["layer_decay"] ** (3 - depth)
    # By kind of module, where the code under test goes by the number of dimensions and by parts of names.
    decays = name.endswith("weight") and "norm" not in name
    return {"lr": rate, "weight_decay": setting["weight_decay"] if decays else 0.0}


def test_equals_a_plain_loop(tmp_path):
    model = classifier()
    plain, images, held_out = copy.deepcopy(model).train(), pixel_set(21, 1), pixel_set(13, 2)
    trained = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p], **plain_rate(name, SETTING)} for name, p in trained])
    num_steps = SETTING["epochs"] * 3
    num_warmup = num_steps // 4

    def factor(step):
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def logits(pixels):
        crops = pixels[:, 2:30, 2:30].permute(0, 3, 1, 2) / 255
        mean, std = (
            torch.tensor(x).view(3, 1, 1) for x in (model.encoder.preprocessing.mean, model.encoder.preprocessing.std)
        )
        return plain((crops - mean) / std)

    history = []
    for epoch in range(SETTING["epochs"]):
        order, losses = torch.randperm(21, generator=seeded_generator(7, epoch)), []
        for rows in (order[:7], order[7:14], order[14:]):  # 21 rows in 3 batches of at most 8
            loss = F.cross_entropy(logits(images.pixels.tensor[rows]), images.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            losses += [loss.item()] * len(rows)
        with torch.no_grad():
            outputs = logits(held_out.pixels.tensor)
        history.append([sum(losses) / 21, F.cross_entropy(outputs, held_out.labels).item()])
    result = train(model, tmp_path, warmup_fraction=0.25, gradient_clip=0.5)
    found = [[epoch["train/loss"], epoch["val/loss"]] for epoch in result.history]
    assert torch.tensor(found) == pytest.approx(torch.tensor(history), abs=1e-4)
    assert history[-1][0] < 0.9 * history[0][0]


@pytest.mark.parametrize("augmentation", [None, AUGMENTATION])
def test_learns(tmp_path, augmentation):
    result = train(
        classifier("stacked_cnn"), tmp_path, {"epochs": 12, "learning_rate": 0.03}, augmentation=augmentation
    )
    assert result.best["val/accuracy"] > 0.85
    assert result.best_epoch == max(
        range(12), key=lambda e: (result.history[e]["val/accuracy"], -result.history[e]["val/loss"])
    )


def test_history_has_the_agreed_keys(tmp_path):
    told = []
    result = train(classifier(), tmp_path, {"epochs": 2}, on_epoch=told.append)
    assert told == result.history
    assert set(told[0]) == {
        "train/loss", "train/images_per_second", "train/learning_rate",
        "time/epoch_s", *VALIDATION_METRICS,
    }  # fmt: skip
    assert {name for name in told[0] if name.startswith("val/")} == set(VALIDATION_METRICS)
    assert set(evaluate_classifier(classifier(), pixel_set(13, 2), options())) == set(VALIDATION_METRICS)
    assert told[0]["train/loss"] == pytest.approx(math.log(3), abs=0.3)
    assert 0 < told[1]["train/learning_rate"] < told[0]["train/learning_rate"] <= SETTING["learning_rate"]


@pytest.mark.parametrize(("direction", "choose"), [("minimize", min), ("maximize", max)])
def test_the_best_epochs_weights_are_kept(tmp_path, direction, choose):
    result = train(classifier(), tmp_path, ranking=Ranking("val/loss", direction))
    losses = [epoch["val/loss"] for epoch in result.history]
    assert losses[0] != losses[-1]
    assert result.best_epoch == losses.index(choose(losses))
    tensors, metadata = load_checkpoint(result.checkpoint)
    assert metadata == {"epoch": result.best_epoch, "metrics": result.best}
    best = classifier(seed=5)
    best.load_state_dict(tensors)
    again = evaluate_classifier(best, pixel_set(13, 2), options())
    assert again == {name: value for name, value in result.best.items() if name in again}


@pytest.mark.parametrize("patience", [1, 2])
def test_stops_early(tmp_path, patience):
    # Nothing moves at a rate of zero, so the first epoch stays the best.
    result = train(classifier(), tmp_path, {"learning_rate": 0.0, "epochs": 6}, patience=patience)
    assert len(result.history) == 1 + patience
    assert result.best_epoch == 0


def test_without_patience_a_schedule_runs_to_its_end(tmp_path):
    assert len(train(classifier(), tmp_path, {"learning_rate": 0.0, "epochs": 6}, patience=None).history) == 6


def test_the_start_is_kept_where_no_epoch_is_better(tmp_path):
    """Rates this high only do harm."""
    model = classifier("stacked_cnn")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranking = Ranking("val/loss", "minimize")
    result = train(model, tmp_path, {"learning_rate": 10.0, "epochs": 2}, ranking=ranking, evaluates_start=True)
    assert result.start == evaluate_classifier(classifier("stacked_cnn"), pixel_set(13, 2), options())
    assert (result.best_epoch, result.best) == (-1, result.start)
    tensors, metadata = load_checkpoint(result.checkpoint)
    assert metadata == {"epoch": -1, "metrics": result.start}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def test_an_epoch_that_is_better_than_the_start_replaces_it(tmp_path):
    result = train(classifier("stacked_cnn"), tmp_path, {"learning_rate": 0.03, "epochs": 8}, evaluates_start=True)
    assert result.best_epoch >= 0
    assert result.best["val/accuracy"] > result.start["val/accuracy"]
    again = train(classifier("stacked_cnn"), tmp_path, {"learning_rate": 0.03, "epochs": 8}, evaluates_start=True)
    assert again == result  # the start too is remembered, not evaluated with the trained weights


@pytest.mark.parametrize("freezes", [True, False])
def test_batch_norm_statistics_stay_if_asked(tmp_path, freezes):
    model = classifier("stacked_cnn")
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name}
    weights = [parameter.clone() for parameter in model.parameters()]
    train(model, tmp_path, {"epochs": 2}, freezes_batch_norm=freezes)
    same = [torch.equal(tensor, before[name]) for name, tensor in model.named_buffers() if "running" in name]
    assert all(same) if freezes else not any(same)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize(("num_steps", "expected"), [(10, 0.98), (500, 0.98), (1_000, 0.99), (100_000, 0.999)])
def test_the_average_reaches_over_a_tenth_of_the_steps(num_steps, expected):
    model = classifier("stacked_cnn")
    average = average_weights(model, "auto", num_steps)
    average.n_averaged.fill_(10**6)  # steps, so that it has reached its largest decay
    with torch.no_grad():
        average.module.head.bias.fill_(0.0)
        model.head.bias.fill_(1.0)
    average.update_parameters(model)
    assert average.module.head.bias[0].item() == pytest.approx(1 - expected, rel=1e-3)


class Interrupted(Exception):
    pass


class FailsAtStep(nn.Module):
    """Forwards to the model, and is killed at one step."""

    def __init__(self, model, step):
        super().__init__()
        self.model, self.left = model, step

    def forward(self, pixel_values):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return self.model(pixel_values)


def interrupted_at_epoch(model, folder, epoch, **more):
    done = []

    def on_epoch(metrics):
        done.append(metrics)
        if len(done) == epoch + 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(model, folder, on_epoch=on_epoch, **more)


EVERYTHING = {
    "augmentation": replace(AUGMENTATION, mixup=0.4, cutmix=1.0),
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "micro_batch_size": 3,
}


@pytest.mark.parametrize("epoch", [0, 2, 3])
@pytest.mark.parametrize("more", [{"augmentation": AUGMENTATION}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("kind", ["dinov2", "stacked_cnn"])
def test_an_interrupted_trial_goes_on_as_if_nothing_had_happened(tmp_path, kind, more, epoch):
    # Dropout, augmentation, moving averages and batch-norm statistics must all come back.
    config = {"hidden_dropout_prob": 0.1} if kind == "dinov2" else {}
    uninterrupted = classifier(kind, **config)
    expected = train(uninterrupted, tmp_path / "a", **more)
    interrupted_at_epoch(classifier(kind, **config), tmp_path / "b", epoch, **more)
    torch.rand(17)
    told, resumed = [], classifier(kind, seed=9, **config)
    result = train(resumed, tmp_path / "b", on_epoch=told.append, **more)
    assert_equal_weights(resumed.state_dict(), uninterrupted.state_dict())
    assert_equal_weights(load_checkpoint(result.checkpoint)[0], load_checkpoint(expected.checkpoint)[0])
    assert timeless(result.history) == timeless(expected.history) == timeless(told)
    assert result.best_epoch == expected.best_epoch


def test_a_checkpoint_of_another_setting_is_not_gone_on_from(tmp_path):
    """As a lost journal would have it, in which the number of the trial was free."""
    interrupted_at_epoch(classifier(), tmp_path / "b", 1)
    another = SETTING | {"learning_rate": SETTING["learning_rate"] / 3}
    result, expected = classifier(), classifier()
    history = train(result, tmp_path / "b", setting=another).history
    assert timeless(history) == timeless(train(expected, tmp_path / "a", setting=another).history)
    assert_equal_weights(result.state_dict(), expected.state_dict())


def train_and_be_killed(folder):
    def on_epoch(metrics):
        if metrics["train/learning_rate"] < 0.6 * SETTING["learning_rate"]:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    train(classifier("stacked_cnn"), folder, on_epoch=on_epoch, **EVERYTHING)


@pytest.mark.process
def test_a_trial_whose_process_was_killed_ends_with_the_same_weights(tmp_path):
    script = f"import {Path(__file__).stem} as this; this.train_and_be_killed(this.Path({str(tmp_path / 'b')!r}))"
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=False)
    assert killed.returncode == -signal.SIGKILL
    num_done = len(load_checkpoint(tmp_path / "b" / "last.safetensors")[1]["history"])
    assert 1 <= num_done < SETTING["epochs"]
    uninterrupted, resumed = classifier("stacked_cnn"), classifier("stacked_cnn", seed=9)
    train(uninterrupted, tmp_path / "a", **EVERYTHING)
    steps = FailsAtStep(resumed, (SETTING["epochs"] - num_done) * 3 * 3)  # 3 steps of up to 3 micro-batches each
    train(resumed, tmp_path / "b", parallel=steps, **EVERYTHING)
    assert_equal_weights(resumed.state_dict(), uninterrupted.state_dict())


@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_kill_within_an_epoch_costs_that_epoch_alone(tmp_path, step):
    uninterrupted, killed, resumed = classifier(), classifier(), classifier()
    train(uninterrupted, tmp_path / "a")
    with pytest.raises(Interrupted):
        train(killed, tmp_path / "b", parallel=FailsAtStep(killed, step))
    train(resumed, tmp_path / "b", parallel=FailsAtStep(resumed, 12 - step // 3 * 3))
    assert_equal_weights(resumed.state_dict(), uninterrupted.state_dict())


def test_a_kill_between_the_two_files_is_made_up_for(tmp_path, monkeypatch):
    uninterrupted = classifier()
    expected = train(uninterrupted, tmp_path / "a", ranking=LEAST_LOSS)
    saved = []

    def save(path, *arguments):
        if len(saved) == 3:
            raise Interrupted
        saved.append(path.name)
        save_checkpoint(path, *arguments)

    monkeypatch.setattr("raysweep.training.loop.save_checkpoint", save)
    with pytest.raises(Interrupted):
        train(classifier(), tmp_path / "b", ranking=LEAST_LOSS)
    monkeypatch.undo()
    assert saved == ["best.safetensors", "last.safetensors", "best.safetensors"]
    result = train(classifier(), tmp_path / "b", ranking=LEAST_LOSS)
    assert timeless(result.history) == timeless(expected.history)
    assert_equal_weights(load_checkpoint(result.checkpoint)[0], load_checkpoint(expected.checkpoint)[0])


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "garbled"])
def test_a_damaged_checkpoint_of_an_interrupted_trial_makes_it_begin_anew(tmp_path, name, damage):
    uninterrupted, killed, resumed = classifier(), classifier(), classifier()
    expected = train(uninterrupted, tmp_path / "a")
    with pytest.raises(Interrupted):
        train(killed, tmp_path / "b", parallel=FailsAtStep(killed, 7))
    path = tmp_path / "b" / name
    content = path.read_bytes()
    garbled = content[:-40] + bytes(255 - byte for byte in content[-40:])
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "garbled": garbled}[damage])
    result = train(resumed, tmp_path / "b")
    assert timeless(result.history) == timeless(expected.history)
    assert_equal_weights(resumed.state_dict(), uninterrupted.state_dict())
    assert_equal_weights(load_checkpoint(result.checkpoint)[0], load_checkpoint(expected.checkpoint)[0])


def test_a_finished_trial_is_not_trained_again(tmp_path):
    first = train(classifier(), tmp_path, {"learning_rate": 0.0, "epochs": 6}, patience=2)
    model = classifier()
    again = train(model, tmp_path, {"learning_rate": 0.0, "epochs": 6}, patience=2, parallel=FailsAtStep(model, 0))
    assert again == first


def test_a_trial_that_diverges_at_once_ends_without_a_value(tmp_path):
    result = train(classifier(), tmp_path, {"learning_rate": 1e30, "epochs": 6})
    assert len(result.history) < 6
    assert math.isnan(result.history[-1]["train/loss"])
    assert math.isnan(result.history[-1]["val/accuracy"])


def test_a_trial_that_diverges_later_keeps_its_best_epoch(tmp_path):
    class Diverges(FailsAtStep):
        def forward(self, pixel_values):
            self.left -= 1
            return self.model(pixel_values) * (math.nan if self.left < 0 else 1.0)

    model = classifier()
    result = train(model, tmp_path, {"epochs": 9}, parallel=Diverges(model, 7))
    assert [math.isfinite(epoch["train/loss"]) for epoch in result.history] == [True, True, False]
    assert result.best_epoch < 2
    assert math.isfinite(result.best["val/accuracy"])
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(result.checkpoint)[0].values())


def test_bfloat16_trains_in_mixed_precision(tmp_path):
    model, other = classifier(), classifier()
    mixed, full = train(model, tmp_path / "a", precision="bf16"), train(other, tmp_path / "b")
    assert mixed.history[-1]["val/loss"] == pytest.approx(full.history[-1]["val/loss"], abs=0.05)
    assert mixed.history[-1]["val/loss"] != full.history[-1]["val/loss"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert predict_logits(model, pixel_set(3, 0).pixels.tensor, "bf16").dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_micro_batches_change_nothing_but_memory(tmp_path, size):
    largest, whole, parts = [], classifier(), classifier()

    class Watched(FailsAtStep):
        def forward(self, pixel_values):
            largest.append(len(pixel_values))
            return self.model(pixel_values)

    expected = train(whole, tmp_path / "a", augmentation=AUGMENTATION)
    watched = Watched(parts, 0)
    found = train(parts, tmp_path / "b", parallel=watched, augmentation=AUGMENTATION, micro_batch_size=size)
    assert max(largest) == {1: 1, 3: 3, 5: 4, 100: 7}[size]
    assert sum(largest) == SETTING["epochs"] * 21
    assert found.history[-1].pop("train/micro_batch_size") == size
    for one, other in zip(timeless(found.history), timeless(expected.history), strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other, abs=1e-4)


def test_label_smoothing_is_torchs(tmp_path):
    told = train(classifier(), tmp_path, {"learning_rate": 0.0, "epochs": 1}, label_smoothing=0.3).history[0]
    model, rows = classifier().train(), pixel_set(21, 1)
    images = model.encoder.preprocessing.normalize(model.encoder.preprocessing.centre_crop(rows.pixels.tensor))
    assert told["train/loss"] == pytest.approx(
        F.cross_entropy(model(images), rows.labels, label_smoothing=0.3).item(), abs=1e-4
    )


def test_the_average_of_the_weights_is_what_is_evaluated_and_kept(tmp_path):
    """Against an average written out by hand, of weights noted after every step."""
    model, seen = classifier("stacked_cnn"), []

    class Noted(FailsAtStep):
        def forward(self, pixel_values):
            seen.append(copy.deepcopy(self.model.state_dict()))
            return self.model(pixel_values)

    result = train(model, tmp_path, {"epochs": 1}, parallel=Noted(model, 0), ema_decay=0.8)
    expected = None
    for step, state in enumerate([*seen[1:], model.state_dict()]):
        weight = state["head.weight"]
        decay = min(0.8, (1 + step) / (10 + step))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    kept = load_checkpoint(result.checkpoint)[0]
    assert len(seen) == 3
    torch.testing.assert_close(kept["head.weight"], expected)
    assert not torch.equal(kept["head.weight"], model.head.weight)
    averaged = classifier("stacked_cnn")
    averaged.load_state_dict(kept)
    again = evaluate_classifier(averaged, pixel_set(13, 2), options())
    assert again == pytest.approx({name: result.best[name] for name in again}, abs=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_average_of_what_stays_the_same_is_the_same(tmp_path, kind):
    """Buffers of whole numbers too: CLIP and SigLIP keep the positions of their patches in one."""
    result = train(classifier(kind), tmp_path, {"learning_rate": 0.0, "weight_decay": 0.0, "epochs": 2}, ema_decay=0.9)
    plain = train(classifier(kind), tmp_path / "b", {"learning_rate": 0.0, "weight_decay": 0.0, "epochs": 2})
    if kind != "stacked_cnn":  # whose batch-norm statistics move
        assert result.best["val/loss"] == pytest.approx(plain.best["val/loss"], abs=1e-6)
    model = classifier(kind)
    model.load_state_dict(load_checkpoint(result.checkpoint)[0])
    again = evaluate_classifier(model, pixel_set(13, 2, model.encoder.preprocessing.training_size[0]), options())
    assert again == pytest.approx({name: result.best[name] for name in again}, abs=1e-6)


def test_strength_scales_the_augmentation(tmp_path):
    centre = Augmentation(min_crop_scale=0.5, horizontal_flip=True, strength=0.0)
    mixing = replace(AUGMENTATION, mixup=0.4, cutmix=1.0)
    losses = [
        train(classifier(), tmp_path / str(case), SETTING | more, augmentation=augmentation).history[-1]["train/loss"]
        for case, (more, augmentation) in enumerate(
            [
                ({"augmentation_strength": 0.0}, mixing),
                ({}, centre),
                ({"augmentation_strength": 1.0}, mixing),
                ({}, mixing),
                ({"augmentation_strength": 0.5}, mixing),
            ]
        )
    ]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    assert len({losses[0], losses[2], losses[4]}) == 3


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, kind):
    config = {"hidden_dropout_prob": 0.1} if kind == "dinov2" else {}
    plain, checkpointed = classifier(kind, **config), classifier(kind, **config)
    assert checkpointed.encoder.supports_gradient_checkpointing
    checkpointed.encoder.enable_gradient_checkpointing()
    calls = []
    blocks = next(m for m in checkpointed.encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    norm = next(module for module in blocks[0].modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    expected = train(plain, tmp_path / "a")
    found = train(checkpointed, tmp_path / "b")
    assert timeless(found.history) == timeless(expected.history)
    assert_equal_weights(checkpointed.state_dict(), plain.state_dict())
    # Twice in each of the 12 steps, once in each of the 4 epochs' single batch of validation rows.
    assert len(calls) == 2 * 12 + 4


def test_encoders_that_cannot_checkpoint_say_so():
    assert not classifier("stacked_cnn").encoder.supports_gradient_checkpointing


@pytest.mark.process
def test_a_compiled_model_trains_alike(tmp_path):
    plain, model = classifier(), classifier()
    expected = train(plain, tmp_path / "a", {"epochs": 2})
    found = train(model, tmp_path / "b", {"epochs": 2}, parallel=torch.compile(model))
    assert [e["train/loss"] for e in found.history] == pytest.approx(
        [e["train/loss"] for e in expected.history], abs=1e-4
    )


def test_evaluation_is_the_plain_mean_over_all_rows(monkeypatch):
    monkeypatch.setattr("raysweep.training.loop.EVALUATION_ROWS", 5)
    model, rows = classifier("stacked_cnn").train(), pixel_set(13, 2)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    metrics = evaluate_classifier(model, rows, options())
    logits = predict_logits(model, rows.pixels.tensor)
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, rows.labels).item(), rel=1e-5)
    assert metrics["val/accuracy"] == pytest.approx((logits.argmax(1) == rows.labels).float().mean().item())
    assert_equal_weights(model.state_dict(), before)


def test_warm_up_then_cosine():
    factor = warmup_cosine(100, 0.1)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])
    assert factor(10) == 1
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0)
    values = [factor(step) for step in range(100)]
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert min(values) > 0


@pytest.mark.parametrize(("num_steps", "fraction"), [(1, 0.05), (1, 1.0), (10, 0.0), (3, 0.3)])
def test_short_schedules_start_at_the_peak_or_warm_up(num_steps, fraction):
    values = [warmup_cosine(num_steps, fraction)(step) for step in range(num_steps)]
    assert all(0 < value <= 1 for value in values)
    assert values[0] == (1 if int(num_steps * fraction) == 0 else 0.5)


DECAY = 0.05


def groups_by_name(model, setting=SETTING):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, setting).param_groups
    return [(names[id(p)], group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_trainable_parameter_is_in_exactly_one_group(kind):
    model = classifier(kind)
    found = groups_by_name(model)
    assert sorted(name for name, _, _ in found) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    decayed = {name for name, _, decay in found if decay == DECAY}
    assert {name for name, _, decay in found if decay == 0.0} == {name for name, _, _ in found} - decayed
    expected = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    } | {n for n, _ in model.named_parameters() if n == "head.weight" or n.endswith("in_proj_weight")}
    assert decayed == {name for name, p in model.named_parameters() if name in expected and p.requires_grad}


def test_named_parameters_that_take_no_weight_decay():
    without = {name.split(".", 2)[-1] for kind in ("dinov2", "clip", "siglip") for name, _, decay in
               groups_by_name(classifier(kind)) if decay == 0.0}  # fmt: skip
    for name in (
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "layernorm.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding.weight",
        "head.probe",
    ):
        assert any(found.endswith(name) for found in without), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_learning_rates_decay_block_by_block(kind):
    rates = {name: rate for name, rate, _ in groups_by_name(classifier(kind))}
    num_blocks = 2 if kind == "stacked_cnn" else 3
    peak, decay = SETTING["learning_rate"], SETTING["layer_decay"]
    assert sorted(set(rates.values())) == pytest.approx([peak * decay**k for k in range(num_blocks, -1, -1)])
    assert {name for name, rate in rates.items() if rate == peak} == {"head.weight", "head.bias"}
    lowest = min(rates.values())
    first = "stages.0." if kind == "stacked_cnn" else "embeddings"
    assert all(rate == lowest for name, rate in rates.items() if first in name)
    flat = {rate for _, rate, _ in groups_by_name(classifier(kind), {"learning_rate": 0.1, "weight_decay": 0})}
    assert flat == {0.1}


@pytest.mark.parametrize(
    ("kind", "source", "frozen"),
    [
        ("dinov2", "cls", {"embeddings.mask_token"}),
        ("dinov2", "cls+mean", {"embeddings.mask_token"}),
        ("clip", "cls", {"visual_projection.weight"}),
        ("clip", "projected", set()),
        ("siglip", "pooler", set()),
        ("siglip", "mean", {"head."}),
        ("stacked_cnn", "pooled", set()),
    ],
)
def test_what_a_source_does_not_reach_is_frozen_and_nothing_else(kind, source, frozen):
    model = classifier(kind, source)
    found = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = {n for n, _ in model.named_parameters() if any(n.startswith(f"encoder.model.{part}") for part in frozen)}
    assert found == expected
    assert len(found) >= len(frozen)
    nn.init.ones_(model.head.weight[0].data)
    model.train()(torch.rand(2, 3, 28, 28))[:, 0].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []


def test_freezing_keeps_what_was_frozen_and_leaves_batch_norm_alone():
    encoder = build_encoder({"type": "stacked_cnn", "image_size": 16, "config": {"channels": [4]}}, seed=0)
    model = Classifier(encoder, Head(4, NUM_CLASSES), "pooled").train()
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    freeze_unused_parameters(model)
    assert_equal_weights(model.state_dict(), before)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert all(p.grad is None for p in model.parameters())
