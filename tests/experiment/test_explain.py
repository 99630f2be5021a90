# ruff: noqa: E501  (a message is one line, however long)
import pytest

from raysweep.errors import ConfigError
from raysweep.experiment.config import load_experiment
from raysweep.experiment.sections import DataConfig

DATA = "data: {source: x}\n"
ENCODERS = "encoders: [{type: dinov2}]\n"
MINIMAL = DATA + ENCODERS
BLOCK = MINIMAL + "search:\n  linear_probe:\n    "

# Each wrong file, with every line that a user reads about it.
CASES = {
    "trainble": (
        DATA + "encoders:\n- type: dinov2\n  trainble: false\n",
        ["encoders.0.trainble (line 4): unknown key; did you mean 'trainable'?"],
    ),
    "lowhigh": (
        BLOCK + "space:\n      learning_rate: {low: 1e-1, high: 1e-4}\n",
        ["search.linear_probe.space.learning_rate (line 6): low (0.1) must be below high (0.0001)"],
    ),
    "dups": (
        MINIMAL + "train: {batch_size: 1, batch_size: 2}\ntrain: {batch_siz: 3}\n",
        [
            "train.batch_size (line 3): given twice, first on line 3",
            "train (line 4): given twice, first on line 3",
            "train.batch_siz (line 4): unknown key; did you mean 'batch_size'?",
        ],
    ),
    "missing both": ("name: x\n", ["data: required, but not given", "encoders: required, but not given"]),
    "no encoders": (DATA + "encoders: []\n", ["encoders (line 2): needs at least one entry"]),
    "encoders map": (
        DATA + "encoders: {type: dinov2}\n",
        ["encoders (line 2): expected a list, found a mapping; start each entry with '- '"],
    ),
    "encoders strs": (
        DATA + "encoders: [dinov2, clip]\n",
        [
            "encoders.0 (line 2): expected keys and values, found 'dinov2'; write {type: dinov2}",
            "encoders.1 (line 2): expected keys and values, found 'clip'; write {type: clip}",
        ],
    ),
    "enc no type": (
        DATA + "encoders: [{image_size: 2}]\n",
        ["encoders.0.type (line 2): required, but not given; one of stacked_cnn, dinov2, clip, siglip, auto"],
    ),
    "enc type typo": (
        DATA + "encoders: [{type: dinov, trainable: true}]\n",
        ["encoders.0.type (line 2): unknown value 'dinov'; did you mean 'dinov2'?"],
    ),
    "num eight": (
        BLOCK + "num_trials: eight\n",
        ["search.linear_probe.num_trials (line 5): expected a whole number, found 'eight'"],
    ),
    "num 8.5": (
        BLOCK + "num_trials: 8.5\n",
        ["search.linear_probe.num_trials (line 5): expected a whole number, found 8.5"],
    ),
    "num '8'": (
        BLOCK + "num_trials: '8'\n",
        ["search.linear_probe.num_trials (line 5): expected a whole number, found '8'; leave out the quotes"],
    ),
    "num True": (
        BLOCK + "num_trials: true\n",
        ["search.linear_probe.num_trials (line 5): expected a whole number, found true"],
    ),
    "num 0": (BLOCK + "num_trials: 0\n", ["search.linear_probe.num_trials (line 5): must be 1 or more, found 0"]),
    "sampler": (
        BLOCK + "sampler: tpee\n",
        ["search.linear_probe.sampler (line 5): unknown value 'tpee'; did you mean 'tpe'?"],
    ),
    "population": (
        BLOCK + "population: many\n",
        ["search.linear_probe.population (line 5): expected a whole number or 'auto', found 'many'"],
    ),
    "population0": (BLOCK + "population: 0\n", ["search.linear_probe.population (line 5): must be 1 or more, found 0"]),
    "mode typo": (
        MINIMAL + "search: {linear_prob: {num_trials: 3}}\n",
        ["search.linear_prob (line 3): unknown key; did you mean 'linear_probe'?"],
    ),
    "section null": (
        MINIMAL + "train:\nsearch:\n",
        [
            "train (line 3): expected keys and values, found nothing; leave the key out for its default",
            "search (line 4): expected keys and values, found nothing; leave the key out for its default",
        ],
    ),
    "dim list": (
        BLOCK + "space: {features: [cls, mean]}\n",
        [
            "search.linear_probe.space.features (line 5): expected a value or {choices: [...]}, found a list; write {choices: [cls, mean]}"
        ],
    ),
    "dim null": (
        BLOCK + "space: {epochs: }\n",
        ["search.linear_probe.space.epochs (line 5): expected a value, {low, high} or {choices: [...]}, found nothing"],
    ),
    "dim range of words": (
        BLOCK + "space: {features: {low: cls, high: mean}}\n",
        [
            "search.linear_probe.space.features (line 5): expected one of cls, mean, cls+mean, projected, pooler, or {choices: [...]} with some of them"
        ],
    ),
    "dim unknown": (
        BLOCK + "space: {lr: 1e-3, dropout: 1}\n",
        [
            "search.linear_probe.space.lr (line 5): unknown key; accepted: epochs, features, learning_rate, normalize, weight_decay",
            "search.linear_probe.space.dropout (line 5): unknown key; accepted: epochs, features, learning_rate, normalize, weight_decay",
        ],
    ),
    "dim missing high": (
        BLOCK + "space: {epochs: {low: 5}}\n",
        ["search.linear_probe.space.epochs.high (line 5): required, but not given"],
    ),
    "dim both": (
        BLOCK + "space: {epochs: {low: 5, high: 8, choices: [1]}}\n",
        ["search.linear_probe.space.epochs (line 5): give either low and high, or choices, not both"],
    ),
    "dim neg": (
        BLOCK
        + "space: {learning_rate: {low: -1, high: 8}, weight_decay: {low: 0, high: 1, log: true}, epochs: {low: 0, high: 5.5}}\n",
        [
            "search.linear_probe.space.learning_rate.low (line 5): must be above 0, found -1",
            "search.linear_probe.space.epochs.high (line 5): expected a whole number, found 5.5",
            "search.linear_probe.space.weight_decay (line 5): log: true needs low above 0, found 0",
        ],
    ),
    "dim choices": (
        BLOCK
        + "space: {learning_rate: {choices: [1e-3, -1, 1e-3]}, features: {choices: [clss, [a]]}, normalize: {choices: []}, epochs: {choices: 3}}\n",
        [
            "search.linear_probe.space.learning_rate.choices (line 5): each choice may stand once, found 0.001 again",
            "search.linear_probe.space.epochs.choices (line 5): expected a list, found 3; write [3]",
            "search.linear_probe.space.features.choices.1 (line 5): expected one of cls, mean, cls+mean, projected, pooler, found a list",
            "search.linear_probe.space.normalize.choices (line 5): needs at least one entry",
        ],
    ),
    "dim choices2": (
        BLOCK
        + "space: {learning_rate: {choices: [1e-3, -1]}, features: {choices: [clss]}, normalize: l1, epochs: 2.5}\n",
        [
            "search.linear_probe.space.learning_rate.choices.1 (line 5): must be above 0, found -1",
            "search.linear_probe.space.epochs (line 5): expected a whole number, found 2.5",
            "search.linear_probe.space.features.choices.0 (line 5): unknown value 'clss'; did you mean 'cls'?",
            "search.linear_probe.space.normalize (line 5): unknown value 'l1'; accepted: l2, none, standardize",
        ],
    ),
    "equal": (
        BLOCK + "space: {epochs: {low: 5, high: 5}}\n",
        ["search.linear_probe.space.epochs (line 5): low and high are both 5: for one fixed value write just 5"],
    ),
    "layer_decay on probe": (
        MINIMAL
        + "search: {linear_probe: {space: {layer_decay: 0.7}}, fine_tune: {space: {layer_decay: {low: 0.5, high: 1.5}, features: cls}}}\n",
        [
            "search.linear_probe.space.layer_decay (line 3): linear_probe has no such dimension; it belongs to fine_tune",
            "search.fine_tune.space.layer_decay.high (line 3): must be 1 or less, found 1.5",
            "search.fine_tune.space.features (line 3): fine_tune has no such dimension; it belongs to linear_probe",
        ],
    ),
    "grid": (
        BLOCK
        + "sampler: grid\n    space: {learning_rate: {low: 1e-4, high: 1e-1, log: true}, weight_decay: {low: 0, high: 1}}\n",
        [
            "search.linear_probe.space.learning_rate (line 6): a grid needs values: write {choices: [...]}",
            "search.linear_probe.space.weight_decay (line 6): a grid needs values: write {choices: [...]}",
        ],
    ),
    "grid big": (
        BLOCK + "sampler: grid\n    space: {learning_rate: {choices: [1e-3, 1e-2]}, epochs: {low: 1, high: 9000}}\n",
        [
            "search.linear_probe.num_trials (line 4): the grid has 36,000 points: offer fewer values, or say here how many to try"
        ],
    ),
    "metric": (
        MINIMAL + "metric: accuracy\n",
        ["metric (line 3): unknown value 'accuracy'; did you mean 'val/accuracy'?"],
    ),
    "metric of test": (
        MINIMAL + "metric: val/balanced_acuracy\n",
        ["metric (line 3): unknown value 'val/balanced_acuracy'; did you mean 'val/balanced_accuracy'?"],
    ),
    "use_gpu": (
        MINIMAL
        + "resources: {use_gpu: maybe, num_workers: 0, gpus_per_worker: 0, max_concurrent_trials: 1.5, cpus_per_worker: half}\n",
        [
            "resources.num_workers (line 3): must be 1 or more, found 0",
            "resources.use_gpu (line 3): expected true or false or 'auto', found 'maybe'",
            "resources.cpus_per_worker (line 3): expected a whole number, found 'half'",
            "resources.gpus_per_worker (line 3): must be above 0, found 0",
            "resources.max_concurrent_trials (line 3): expected a whole number or 'auto', found 1.5",
        ],
    ),
    "train": (
        MINIMAL
        + "train: {batch_size: 6.4e1, precision: fp16, augmentation: false, warmup_fraction: 2, gradient_clip: .nan, early_stopping_patience: '5'}\n",
        [
            "train.batch_size (line 3): expected a whole number, found 6.4e1",
            "train.precision (line 3): unknown value 'fp16'; did you mean 'bf16'?",
            "train.early_stopping_patience (line 3): expected a whole number or null, found '5'; leave out the quotes",
            "train.augmentation (line 3): expected keys and values or null, found false; its keys are min_crop_scale, horizontal_flip, mixup, cutmix",
            "train.warmup_fraction (line 3): must be below 1, found 2",
            "train.gradient_clip (line 3): must be a finite number, found .nan",
        ],
    ),
    "aug": (
        MINIMAL + "train: {augmentation: {min_crop_scale: 0, flip: true}}\n",
        [
            "train.augmentation.min_crop_scale (line 3): must be above 0, found 0",
            "train.augmentation.flip (line 3): unknown key; accepted: cutmix, horizontal_flip, min_crop_scale, mixup",
        ],
    ),
    "data": (
        "data: {source: , shots: [5, all, 5, 0, most, 2.5], validation_fraction: 0.5, test_fraction: 0.6, max_bad_fraction: 3, image: 3}\n"
        + ENCODERS,
        [
            "data.source (line 1): required, but not given",
            "data.image (line 1): expected text or null, found 3; put it in quotes",
            "data.test_fraction (line 1): with validation_fraction (0.5) it must stay below 1, found 0.6",
            "data.max_bad_fraction (line 1): must be 1 or less, found 3",
            "data.shots.3 (line 1): must be 1 or more, found 0",
            "data.shots.4 (line 1): expected a whole number or 'all', found 'most'",
            "data.shots.5 (line 1): expected a whole number or 'all', found 2.5",
        ],
    ),
    "shots repeated": (
        "data: {source: x, shots: [5, all, 5]}\n" + ENCODERS + "modes: [fine_tune, fine_tune]\n",
        ["data.shots.2 (line 1): 5 is listed twice", "modes.1 (line 3): fine_tune is listed twice"],
    ),
    "shots scalar": (
        "data: {source: x, shots: 5}\n" + ENCODERS,
        ["data.shots (line 1): expected a list, found 5; write [5]"],
    ),
    "few-shot seeds": (
        "data: {source: x, few_shot_seeds: 0}\n" + ENCODERS,
        ["data.few_shot_seeds (line 1): must be 1 or more, found 0"],
    ),
    "folds of few shots": (
        "data: {source: x, shots: [5, 10], folds: 5}\n" + ENCODERS,
        ["data.folds (line 1): folds are of all images, and shots lists 5, 10; add all, or leave folds out"],
    ),
    "folds": (
        "data: {source: x, folds: 1}\n" + ENCODERS,
        ["data.folds (line 1): must be 2 or more, found 1"],
    ),
    "baselines": (
        BLOCK + "baselines: [knn, kmeans, knn]\n",
        ["search.linear_probe.baselines.1 (line 5): unknown value 'kmeans'; accepted: knn, logistic, ridge"],
    ),
    "baselines repeated": (
        BLOCK + "baselines: [ridge, ridge]\n",
        ["search.linear_probe.baselines.1 (line 5): ridge is listed twice"],
    ),
    "refit": (
        BLOCK + "refit: 1\n",
        ["search.linear_probe.refit (line 5): expected true or false, found 1"],
    ),
    "refit elsewhere": (
        MINIMAL + "search: {fine_tune: {refit: false}}\n",
        [
            "search.fine_tune.refit (line 3): unknown key; accepted: num_trials, population, sampler, scheduler, space, time_budget_s"
        ],
    ),
    "baselines elsewhere": (
        MINIMAL + "search: {fine_tune: {baselines: [knn]}}\n",
        [
            "search.fine_tune.baselines (line 3): unknown key; accepted: num_trials, population, sampler, scheduler, space, time_budget_s"
        ],
    ),
    "scheduler misspelt": (
        MINIMAL + "search: {fine_tune: {scheduler: ahsa}}\n",
        ["search.fine_tune.scheduler (line 3): unknown value 'ahsa'; did you mean 'asha'?"],
    ),
    "scheduler of a probe": (
        BLOCK + "scheduler: asha\n",
        [
            "search.linear_probe.scheduler (line 5): the heads train together, so that none is stopped alone, found asha; "
            "leave it out"
        ],
    ),
    "scheduler with a range of epochs": (
        MINIMAL + "search: {fine_tune: {scheduler: median, space: {epochs: {low: 3, high: 9}}}}\n",
        [
            "search.fine_tune.space.epochs (line 3): scheduler: median compares trials epoch by epoch; write the one "
            "number that every trial would train for, as in epochs: 9"
        ],
    ),
    "scheduler with choices of epochs": (
        MINIMAL + "search: {from_scratch: {scheduler: asha, space: {epochs: {choices: [20, 30, 10]}}}}\n",
        [
            "search.from_scratch.space.epochs (line 3): scheduler: asha compares trials epoch by epoch; write the one "
            "number that every trial would train for, as in epochs: 30"
        ],
    ),
    "shared resources": (
        MINIMAL + "resources: {max_concurrent_studies: 0, feature_memory_gb: 0}\n",
        [
            "resources.max_concurrent_studies (line 3): must be 1 or more, found 0",
            "resources.feature_memory_gb (line 3): must be above 0, found 0",
        ],
    ),
    "shots empty": (
        "data: {source: '', shots: []}\n" + ENCODERS,
        ["data.source (line 1): must not be empty", "data.shots (line 1): needs at least one entry"],
    ),
    "cnn": (
        DATA
        + "encoders: [{type: stacked_cnn, use_pretrained: true, pretrained_model_name_or_path: a/b, trainable: false}]\n",
        [
            "encoders.0.use_pretrained (line 2): stacked_cnn has no pretrained weights; leave the key out, or pick another type",
            "encoders.0.pretrained_model_name_or_path (line 2): stacked_cnn has no pretrained weights; leave the key out, or pick another type",
            "encoders.0.trainable (line 2): a stacked_cnn starts from random weights and cannot be frozen; leave the key out",
        ],
    ),
    "auto": (
        DATA + "encoders: [{type: auto}]\n",
        ["encoders.0.pretrained_model_name_or_path (line 2): type auto needs a hub id or a local folder here"],
    ),
    "config": (
        DATA + "encoders: [{type: clip, config: {hidden_size: 3}}]\n",
        [
            "encoders.0.config (line 2): pretrained weights fix the architecture: set use_pretrained: false, or leave config out"
        ],
    ),
    "date config": (
        DATA + "encoders: [{type: clip, use_pretrained: false, config: {a: 2024-01-01}}]\n",
        ["encoders.0.config.a (line 2): expected text, found 2024-01-01; put it in quotes"],
    ),
    "no mode": (
        DATA + "encoders: [{type: clip}]\nmodes: [from_scratch]\n",
        [
            "encoders.0 (line 2): no mode left: modes lists from_scratch; a pretrained clip takes linear_probe, fine_tune (from_scratch needs use_pretrained: false)"
        ],
    ),
    "same": (
        DATA + "encoders: [{type: clip}, {type: clip, trainable: false}]\n",
        ["encoders.1 (line 2): same encoder and mode (linear_probe) as encoders.0"],
    ),
    "modes": (
        MINIMAL + "modes: [linear_probe, finetune, linear_probe]\n",
        ["modes.1 (line 3): unknown value 'finetune'; did you mean 'fine_tune'?"],
    ),
    "modes str": (
        MINIMAL + "modes: fine_tune\n",
        ["modes (line 3): expected a list or null, found 'fine_tune'; write [fine_tune]"],
    ),
    "name": (
        MINIMAL + "name: my/beans run\n",
        ["name (line 3): becomes a file name: letters, digits and . _ + - only; write my-beans-run"],
    ),
    "name num": (MINIMAL + "name: 42\n", ["name (line 3): expected text, found 42; put it in quotes"]),
    "name null": (
        MINIMAL + "name:\n",
        ["name (line 3): expected text, found nothing; leave the key out for its default"],
    ),
    "name date": (MINIMAL + "name: 2024-01-01\n", ["name (line 3): expected text, found 2024-01-01; put it in quotes"]),
    "revision": (
        DATA + "encoders: [{type: clip, revision: 1234567, image_size: big}]\n",
        [
            "encoders.0.revision (line 2): expected text, found 1234567; put it in quotes",
            "encoders.0.image_size (line 2): expected a whole number or null, found 'big'",
        ],
    ),
    "nonstr key": (
        MINIMAL + "on: 3\n5: 4\n",
        [
            "on (line 3): YAML does not read this key as text; put it in quotes",
            "5 (line 4): YAML does not read this key as text; put it in quotes",
        ],
    ),
    "data str": (
        "data: beans\n" + ENCODERS,
        ["data (line 1): expected keys and values, found 'beans'; its keys are " + ", ".join(DataConfig.model_fields)],
    ),
    "recursive2": (
        DATA + "encoders: [{type: clip, use_pretrained: false, config: &a {x: *a}}]\n",
        ["encoders.0.config.x.x (line 2): an anchor (&) may not contain itself"],
    ),
    "ludwig": (
        DATA + "encoders: [{type: clip, trainable: 'false', saved_weights_in_checkpoint: no}]\n",
        ["encoders.0.trainable (line 2): expected true or false or null, found 'false'; leave out the quotes"],
    ),
}


def problems(path, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_experiment(path, overrides)
    first, *lines = str(error.value).splitlines()
    assert first == f"{path}: {len(lines)} problem{'s' * (len(lines) > 1)}"
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_message(tmp_path, case):
    text, expected = CASES[case]
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert problems(path) == expected


def test_overrides_are_named_as_the_place(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(BLOCK + "space: {epochs: 5, learning_rate: {low: 1e-3, high: 1e-2}}\n")
    overrides = ["search.linear_probe.num_trials=eight", "search.linear_prob.num_trials=8", "encoders.0.trainble=true"]
    assert problems(path, [*overrides, "search.linear_probe.space.learning_rate.low=1"]) == [
        "encoders.0.trainble (--set): unknown key; did you mean 'trainable'?",
        "search.linear_prob (--set): unknown key; did you mean 'linear_probe'?",
        "search.linear_probe.num_trials (--set): expected a whole number, found 'eight'",
        "search.linear_probe.space.learning_rate (line 5 and --set): low (1) must be below high (0.01)",
    ]
