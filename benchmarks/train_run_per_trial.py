"""Trials per minute, compared with one Ray Train run per Tune trial, as in Ray's guide to tuning Ray Train.

Both use the same cached features. The guide's trials run two at a time, each with one worker of one CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cached import prepare
from benchmarks.figures import Figure, Options, make_figure
from benchmarks.marginal import BATCH_SIZE, seconds_per_trial, trial_counts
from raysweep.cluster.session import ray_session

NUM_TRIALS, NUM_CONCURRENT, NUM_EPOCHS = 4, 2, 20


def train_head(config: dict[str, Any]) -> None:
    """Trains one head on one worker and reports every epoch."""
    import ray.train

    data = torch.load(config["features"], weights_only=True)
    features, labels = data["features"].float(), data["labels"]
    layer = nn.Linear(features.shape[1], data["num_classes"])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=config["learning_rate"])
    for epoch in range(NUM_EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = F.cross_entropy(layer(features[rows]), labels[rows])
            loss.backward()
            optimizer.step()
        ray.train.report({"epoch": epoch, "loss": loss.item()})


def train_driver(config: dict[str, Any]) -> None:
    """The Tune trial: starts a Train run, and passes its reports on."""
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        train_head,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def seconds_of_train_runs(features: Path, scratch: Path) -> float:
    """Returns the seconds of `Tuner.fit`, without the start of Ray."""
    with ray_session(verbose=False):
        from ray import tune

        tuner = tune.Tuner(
            # One byte of memory: the workers' placement groups lie outside the trial.
            tune.with_resources(train_driver, {"memory": 1}),
            param_space={
                "features": str(features),
                "storage": str(scratch / "train"),
                "learning_rate": tune.loguniform(1e-4, 1e-1),
            },
            tune_config=tune.TuneConfig(num_samples=NUM_TRIALS, max_concurrent_trials=NUM_CONCURRENT),
            run_config=tune.RunConfig(name="guide", storage_path=str(scratch / "tune"), verbose=0),
        )
        started = time.perf_counter()
        results = tuner.fit()
        seconds = time.perf_counter() - started
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} of {NUM_TRIALS} Train runs failed: {results.errors[0]}")
    return seconds


def run(options: Options) -> Iterator[Figure]:
    """Yields both rates and their ratio."""
    data = prepare(options)
    train, _, _, num_classes = data.feature_sets()
    features = options.scratch / "features.pt"
    part = next(iter(train.parts.values()))
    torch.save({"features": part, "labels": train.labels, "num_classes": num_classes}, features)
    guide = NUM_TRIALS / seconds_of_train_runs(features, options.scratch) * 60
    yield make_figure("train_run_per_trial", "one Train run per trial", guide, "trials/min")
    marginal, seconds = seconds_per_trial(options, data, 1)
    ours = 60 / marginal
    yield make_figure("train_run_per_trial", "raysweep, each further trial", ours, "trials/min", sweeps_s=seconds)
    yield make_figure("train_run_per_trial", "raysweep / one Train run per trial", ours / guide, "x", ">= 200")
    # Both include the start; for raysweep, it is the whole command.
    num_trials = trial_counts(options)[1]
    whole = 60 * num_trials / seconds[str(num_trials)][0]
    name = f"a whole sweep of {num_trials} trials / one Train run per trial"
    yield make_figure("train_run_per_trial", name, whole / guide, "x")
