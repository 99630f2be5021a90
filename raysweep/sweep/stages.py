"""The stages of a sweep: caches, probes, what trains on pixels, and the leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysweep.sweep.state import SweepContext
from raysweep.errors import TrialError
from raysweep.experiment.config import StudyConfig
from raysweep.sweep.study_group import Group
from raysweep.images.cache import Cache
from raysweep.cluster.resources import check_resources, num_concurrent_trials, num_fitting_workers
from raysweep.results.leaderboard import rank_rows, write_leaderboard
from raysweep.sweep.optuna_study import open_store, study_space
from raysweep.sweep.study import SearchStudy, Study


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves behind: the ranked rows, and how much had to be done for them this time."""

    rows: list[dict[str, Any]]
    num_new_trials: int
    num_encoder_passes: int
    failures: tuple[str, ...] = ()


def check_studies(context: SweepContext) -> None:
    """Looks at every encoder and search space, so that what is wrong with the last study shows at once.

    Raises:
        EncoderError: weights cannot be loaded.
        ConfigError: an encoder has none of the feature sources asked for, or Optuna's database cannot be used.
    """
    experiment = context.experiment
    if experiment.tracking.optuna_uri is not None:
        open_store(experiment.tracking.optuna_uri)
    for config in experiment.studies():
        sources = list(context.encoder(config).description.sources)
        study_space(experiment.search.block(config.mode), sources, config.encoder_name)


def run_stages(context: SweepContext) -> SweepResult:
    """Makes the caches, works through the probes and then through what trains on pixels, and concludes."""
    configs = context.experiment.studies()
    caches = context.caches(configs)
    studies: list[Study] = []
    for stage in (["linear_probe"], ["fine_tune", "from_scratch"]):  # fine-tuning starts from the best probe's head
        groups = make_groups(context, [config for config in configs if config.mode in stage], caches)
        waiting = [group for group in groups if group.has_work]
        if waiting:
            run_stage(context, waiting)
        for group in groups:
            if not group.is_tested:
                group.choose()
            studies += [*group.searches, *group.baselines]
    context.ray.leave()
    outcomes, failures = [], []
    order = {config.name: place for place, config in enumerate(configs)}
    for study in sorted(studies, key=lambda study: order.get(study.config.name, len(order))):
        try:
            outcomes.append(study.conclude())
        except TrialError as error:  # what is wrong with one study need not be wrong with the others
            failures.append(str(error))
            context.progress.warn(f"{study.config.name} has no result: {error}")
    if not outcomes:
        raise TrialError("; ".join(failures))
    return replace(conclude(context, outcomes), failures=tuple(failures))


def make_groups(context: SweepContext, configs: Sequence[StudyConfig], caches: dict[str, Cache]) -> list[Group]:
    """Opens studies, those that share their features as one group, with the baselines on the same features."""
    shared: dict[str, list[StudyConfig]] = {}
    for config in configs:
        shared.setdefault(config.encoder_name if config.mode == "linear_probe" else config.name, []).append(config)
    groups = []
    for members in shared.values():
        searches = [SearchStudy(context, config, caches[config.name]) for config in members]
        baselines = [
            Study(context, baseline_of(config, name), caches[config.name])
            for config in members
            if config.mode == "linear_probe"
            for name in context.experiment.search.linear_probe.baselines
        ]
        groups.append(Group(context, searches, baselines))
    return groups


def baseline_of(config: StudyConfig, name: str) -> StudyConfig:
    """The study of a classifier without trials, on the features of a probe."""
    return config.model_copy(update={"name": config.name.replace("linear_probe", name), "mode": name})


def run_stage(context: SweepContext, groups: Sequence[Group]) -> None:
    """Works through groups side by side, as many as fit."""
    from raysweep.sweep.tune_run import run_groups  # imports Ray Tune, which a finished sweep does not need

    for group in groups:
        group.first.encoder.load_ahead()  # for the export of its models, while they are trained
    resources = context.experiment.resources
    reserved_cpus = max(group.reserved_cpus for group in groups)
    check_resources(resources, context.resources, reserved_cpus)

    told = False

    def num_runs() -> int:
        nonlocal told
        present = context.ray.resources_now
        if num_fitting_workers(resources, present, reserved_cpus) < resources.num_workers and not told:
            context.progress.warn("too few nodes are there by now for a training run; waiting for others to join")
            told = True
        fitting = num_concurrent_trials(resources, present, reserved_cpus)
        # One that waits for room is what makes an autoscaler bring nodes.
        return fitting + 1 if resources.wait_for_nodes_s and resources.max_concurrent_trials == "auto" else fitting

    limit = resources.max_concurrent_studies
    run_groups(groups, context.paths.tune, num_groups=len(groups) if limit == "auto" else limit, num_runs=num_runs)


def conclude(context: SweepContext, outcomes: list[dict[str, Any]]) -> SweepResult:
    """Ranks the studies, writes the leaderboard, registers the winner, and ends the sweep's MLflow run.

    The leaderboard is ordered by the test split; the model that is registered is the best by validation, so that
    nothing is chosen on test.
    """
    experiment, recorder, run_id = context.experiment, context.recorder, context.run_id
    rows = rank_rows([o["row"] for o in outcomes], [o["correct"] for o in outcomes], experiment.seed)
    write_leaderboard(rows, context.paths.leaderboard_json, context.paths.leaderboard_csv)
    for path in (context.paths.leaderboard_json, context.paths.leaderboard_csv, context.paths.quarantine):
        recorder.send("log_file", run_id, path)
    sign = 1 if experiment.direction == "maximize" else -1
    # Few-shot scores are means over capped validation splits: they compare among themselves only.
    shots = max((outcome["row"]["shots"] for outcome in outcomes), key=lambda n: float("inf") if n == "all" else n)
    exported = [o for o in outcomes if o["model_uri"] is not None and o["row"]["shots"] == shots]
    if exported:
        winner = max(exported, key=lambda outcome: sign * outcome["val_metric"])
        recorder.send("log_metrics", run_id, {"test/accuracy": winner["row"]["test_accuracy"]})
        if name := experiment.tracking.register_model:
            version = recorder.call("register", winner["model_uri"], name)
            context.progress.say(
                f"registered {winner['row']['study']}, the best by validation, as {name} version {version}"
            )
    recorder.send("finish", run_id)
    recorder.wait()
    return SweepResult(rows, context.num_new_trials, context.num_encoder_passes)
