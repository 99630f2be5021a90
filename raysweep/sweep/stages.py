"""The stages of a sweep: caches, studies that read features, studies that read pixels, and the leaderboard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysweep.cluster.resources import check_resources, num_concurrent_trials, num_fitting_workers
from raysweep.errors import ConfigError, DataError, RaysweepError, TrialError, hide_secrets
from raysweep.experiment.config import Experiment
from raysweep.experiment.search_blocks import study_space
from raysweep.experiment.studies import StudyConfig
from raysweep.images.cache import Cache
from raysweep.images.rows import count_groups
from raysweep.results.description import sweep_description
from raysweep.results.environment import environment_tags
from raysweep.results.leaderboard import Row, rank_rows, write_leaderboard
from raysweep.results.model import remove_unfinished
from raysweep.results.tracking import Tracker
from raysweep.storage.copies import location
from raysweep.storage.paths import read_json, signature
from raysweep.sweep.caches import find_or_make_caches
from raysweep.sweep.feature_copies import warn_of_feature_copies
from raysweep.sweep.leaderboard_entry import METHOD, LeaderboardEntry, open_baseline
from raysweep.sweep.near_copies import join_near_copies
from raysweep.sweep.outcome import Outcome
from raysweep.sweep.report_files import make_report
from raysweep.sweep.state import SweepState
from raysweep.sweep.study import Study, open_study
from raysweep.sweep.study_group import StudyGroup
from raysweep.sweep.trial_store import open_store

# Keys of `data` by which a sweep's MLflow run is found; what the other keys change is in the index's fingerprint.
KEYED_DATA = (
    "source", "image", "label", "split", "validation_fraction", "test_fraction", "max_bad_fraction", "shots",
    "few_shot_seeds",
)  # fmt: skip
REPORT = ("report.html", "report.md", "figures")  # in the sweep's folder


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The result of a sweep: the ranked rows, how much work this invocation did, and the link to the saved view."""

    rows: Sequence[Row]
    num_new_trials: int
    num_encoder_passes: int
    failures: tuple[str, ...] = ()
    view: str = ""


def check_studies(state: SweepState) -> None:
    """Checks every encoder and search space, so that an error in the last study shows at once.

    Raises:
        EncoderError: weights cannot be loaded.
        ConfigError: an encoder has none of the requested feature sources, Optuna's database cannot be used, or
            `data.folds` has no baseline to judge.
        DataError: `data.folds` is more than the images allow.
    """
    experiment = state.experiment
    check_folds(state)
    if experiment.tracking.optuna_uri is not None:
        open_store(experiment.tracking.optuna_uri)
    for config in experiment.studies():
        sources = list(state.encoder(config).spec.sources)
        study_space(experiment.search.block(config.mode), sources, config.encoder_name)


def check_folds(state: SweepState) -> None:
    """Checks that `data.folds` judges something, and that each class has as many images, or groups, as there are folds.

    Before the pass this is about what the index knows, and after it about bad rows and near copies too.

    Raises:
        ConfigError: no baseline is made.
        DataError: a class has fewer.
    """
    experiment = state.experiment
    num_folds = experiment.data.folds
    if num_folds is None:
        return
    if not any(experiment.baselines_of(config) for config in experiment.studies()):
        asked = "no encoder has a linear_probe with search.linear_probe.baselines"
        raise ConfigError(f"data.folds: {num_folds}, but folds judge only knn, ridge and logistic, and {asked}")
    for name, count in zip(state.index.classes, count_groups(state.index, list(state.bad_rows.values())), strict=True):
        if count < num_folds:
            kind = "images" if state.index.groups is None else "groups of images"
            found = f"class '{name}' has {count} {kind} in all splits"
            raise DataError(f"data.folds: {num_folds}, but {found}; each fold needs one: use fewer folds, or none")


def run_stages(state: SweepState, entries: list[LeaderboardEntry]) -> SweepResult:
    """Makes the caches, runs both stages and writes the leaderboard.

    Studies that read features come first, because fine-tuning starts from the best of their heads.

    Args:
        state: state that all studies share.
        entries: empty; receives studies and baselines as they are opened.

    Raises:
        TrialError: no study has a result.
    """
    configs = state.experiment.studies()
    remove_unfinished(state.paths.models)
    shutil.rmtree(state.paths.tune, ignore_errors=True)  # of a killed sweep
    caches = find_or_make_caches(state, configs)
    join_near_copies(state)
    _ = state.rows  # raises DataError if a split has no usable image, before anything is logged
    check_folds(state)
    state.run_id = start_sweep_run(state)
    warn_of_feature_copies(state, configs, caches)
    for reads_features in (True, False):
        groups = open_groups(state, [config for config in configs if config.reads_features is reads_features], caches)
        entries += [entry for group in groups for entry in group.entries]
        waiting = [group for group in groups if group.has_work]
        for entry in (entry for group in waiting for entry in group.entries if not entry.is_settled):
            entry.reopen_run()
        if waiting:
            run_stage(state, waiting)
        for group in groups:
            if not group.is_tested:
                group.choose()
            for baseline in group.baselines:
                baseline.offer_start()
    state.ray.leave()
    outcomes, failures, concluded = [], state.failures, []
    order = {config.name: place for place, config in enumerate(configs)}
    for entry in sorted(entries, key=lambda entry: order.get(entry.name, len(order))):
        try:
            outcomes.append(entry.conclude())
            concluded.append(entry)
            if entry.shortfall:
                failures.append(entry.shortfall)
        except TrialError as error:  # the other studies may still have results
            failures.append(str(error))
            state.progress.warn(f"{entry.name} has no result: {error}")
    if not outcomes:
        raise TrialError("; ".join(failures))
    rows = conclude(state, outcomes, concluded)
    return SweepResult(rows, state.num_new_trials, state.num_encoder_passes, tuple(failures), state.view)


def conclude_finished(state: SweepState, entries: Sequence[LeaderboardEntry]) -> list[Row]:
    """Ends the MLflow runs when a sweep is stopped, those of unfinished work as KILLED; returns the ranked rows.

    The leaderboard's files are written too, unless those of an earlier invocation have other rows.
    """
    finished = [entry for entry in entries if entry.outcome is not None or (entry.is_settled and not entry.failure)]
    try:
        outcomes = [entry.conclude() for entry in finished]
        for run_id in [entry.run_id for entry in entries if entry not in finished] + [state.run_id]:
            state.recorder.send(Tracker.finish, run_id, "KILLED")
        state.recorder.wait()
    except RaysweepError as error:
        state.progress.warn(str(error))
        return []
    rows = ranked(state, outcomes)
    if rows and _written_studies(state) <= {row.study for row in rows}:
        write_rows(state, rows)
    return rows


def _written_studies(state: SweepState) -> set[str]:
    path = state.paths.leaderboard_json
    return {row["study"] for row in read_json(path)} if path.exists() else set()


def start_sweep_run(state: SweepState) -> str:
    """Starts the sweep's MLflow run, or reopens the existing run; returns its id."""
    # Between invocations of one sweep, the budget, the resources and the storage may change.
    settings = state.experiment.model_dump(exclude={"tracking", "resources", "storage"})
    # The folds depend on both.
    given = [name for name in ("group", "folds") if settings["data"][name] is not None]
    settings["data"] = {name: settings["data"][name] for name in (*KEYED_DATA, *given)}
    for block in settings["search"].values():
        for name in ("num_trials", "time_budget_s", "population", "baselines", "refit"):
            block.pop(name, None)
    root, recorder = location(state.paths.root), state.recorder
    key = signature([METHOD, state.index.fingerprint, settings])
    name = state.experiment.name
    tags = {**environment_tags(root), "raysweep.sweep": name}
    counts = {split: sum(by_class.values()) for split, by_class in state.index.counts().items()}
    run_id, _ = recorder.call(Tracker.start_run, key, name, "sweep", None, tags, sweep_params(state.experiment, counts))
    state.view = recorder.call(Tracker.save_view)
    source = state.experiment.data.source
    folder = source.rstrip("/").split("/")[-1]
    recorder.send(Tracker.log_dataset, run_id, folder, state.index.fingerprint, source, str(counts))
    recorder.send(Tracker.log_file, run_id, state.paths.resolved_experiment)
    recorder.send(Tracker.fail_unfinished_sweeps, root)
    return run_id


def sweep_params(experiment: Experiment, counts: Mapping[str, int]) -> dict[str, Any]:
    """Returns the parameters of a sweep's run: of the experiment, what cannot change between its invocations.

    Args:
        experiment: the experiment.
        counts: number of images by split.
    """
    studies = experiment.studies()
    return {
        "source": hide_secrets(experiment.data.source),
        "encoders": ", ".join(dict.fromkeys(study.encoder_name for study in studies)),
        "modes": ", ".join(dict.fromkeys(study.kind for study in studies)),
        "shots": ", ".join(dict.fromkeys(str(study.shots) for study in studies)),
        "metric": experiment.metric,
        "seed": experiment.seed,
        "batch_size": experiment.train.batch_size,
        **{f"num_{split}": count for split, count in counts.items()},
    }


def open_groups(state: SweepState, configs: Sequence[StudyConfig], caches: Mapping[str, Cache]) -> list[StudyGroup]:
    """Opens studies and baselines. Those that read the same features form one group."""
    shared: dict[tuple[str, str], list[StudyConfig]] = {}
    for config in configs:
        features_of = config.encoder_name if config.reads_features else config.name
        shared.setdefault((features_of, config.kind), []).append(config)
    groups = []
    for members in shared.values():
        studies = [study for config in members if (study := open_study_if_possible(state, config, caches[config.name]))]
        baselines = [
            open_baseline(state, baseline, caches[config.name])
            for config in members
            for baseline in state.experiment.baselines_of(config)
        ]
        if studies:
            groups.append(StudyGroup(state, studies, baselines))
    return groups


def open_study_if_possible(state: SweepState, config: StudyConfig, cache: Cache) -> Study | None:
    """Opens a study; returns None, and notes why, if the head that it starts from is lost: the others go on."""
    try:
        return open_study(state, config, cache)
    except TrialError as error:
        state.failures.append(str(error))
        state.progress.warn(f"{config.name} has no result: {error}")
        return None


def run_stage(state: SweepState, groups: Sequence[StudyGroup]) -> None:
    """Runs as many groups in parallel as the resources allow."""
    from raysweep.sweep.tune_run import run_groups  # imports Ray Tune, which a finished sweep does not need

    for group in groups:
        group.first.encoder.load_ahead()  # the export of its models needs it; it loads while they train
    resources = state.experiment.resources
    reserved_cpus = max(group.reserved_cpus for group in groups)
    check_resources(resources, state.resources, reserved_cpus)

    warned = False

    def num_runs() -> int:
        nonlocal warned
        present = state.ray.resources_now
        if num_fitting_workers(resources, present, reserved_cpus) < resources.num_workers and not warned:
            state.progress.warn("too few nodes are there by now for a training run; waiting for others to join")
            warned = True
        fitting = num_concurrent_trials(resources, present, reserved_cpus)
        # An autoscaler adds nodes only while a run waits for resources.
        return fitting + 1 if resources.wait_for_nodes_s and resources.max_concurrent_trials == "auto" else fitting

    limit = resources.max_concurrent_studies
    run_groups(
        groups,
        state.paths.tune,
        num_groups=len(groups) if limit == "auto" else limit,
        num_runs=num_runs,
        max_failures=resources.max_failures,
        warn=state.progress.warn,
    )


def conclude(state: SweepState, outcomes: Sequence[Outcome], entries: Sequence[LeaderboardEntry]) -> list[Row]:
    """Ranks the studies, writes the leaderboard, registers the best model, and ends the sweep's MLflow run.

    The order of the rows and the registered model are chosen on validation, because the test split must not choose.
    """
    experiment, recorder, run_id = state.experiment, state.recorder, state.run_id
    rows = ranked(state, outcomes)
    write_rows(state, rows)
    make_report(state, entries)
    log_files(state)
    recorder.send(Tracker.describe, run_id, sweep_description(rows))
    best = best_by_validation(state, outcomes)
    if best is not None:
        recorder.send(Tracker.log_metrics, run_id, {"test/accuracy": best.row.test_accuracy})
        if name := experiment.tracking.register_model:
            assert best.model_uri is not None
            version = recorder.call(Tracker.register, best.model_uri, name)
            if version:  # not where the store is lost
                state.progress.say(f"registered {best.row.study}, the best by validation, as {name} version {version}")
    recorder.send(Tracker.finish, run_id)
    recorder.wait()
    if recorder.is_lost:
        root, uri = location(state.paths.root), hide_secrets(experiment.tracking.uri)
        state.progress.warn(f"MLflow at {uri} lacks a part of this sweep, all of which is in {root}")
    return rows


def write_rows(state: SweepState, rows: Sequence[Row]) -> None:
    """Writes the leaderboard's files."""
    paths = state.paths
    stored = [replace(row, model_path=row.model_path and paths.relative(row.model_path)) for row in rows]
    write_leaderboard(stored, paths.leaderboard_json, paths.leaderboard_csv)


def log_files(state: SweepState) -> None:
    """Logs the sweep's tables and its report to its MLflow run, as far as they exist."""
    paths = state.paths
    tables = paths.leaderboard_json, paths.leaderboard_csv, paths.quarantine, paths.near_copies, paths.feature_copies
    for path in tables:
        if path.exists():
            state.recorder.send(Tracker.log_file, state.run_id, path)
    for path in (paths.root / name for name in REPORT):
        if path.exists():
            state.recorder.send(Tracker.log_file, state.run_id, path, path.name if path.is_dir() else None)


def ranked(state: SweepState, outcomes: Sequence[Outcome]) -> list[Row]:
    """Returns the rows in the order of their validation scores; the test split says which of them may be the best."""
    return rank_rows(
        [outcome.row for outcome in outcomes],
        [score_of(state, outcome) for outcome in outcomes],
        [outcome.test.hit_table() for outcome in outcomes],
        state.experiment.seed,
    )


def score_of(state: SweepState, outcome: Outcome) -> tuple[float, float]:
    """Returns the key on validation that ranks an outcome among others."""
    return state.ranking.key(outcome.ranking_metrics(state.ranking.metric))


def best_by_validation(state: SweepState, outcomes: Sequence[Outcome]) -> Outcome | None:
    """Returns the best outcome that has a model, among those with the most training images; None if there is none.

    Few-shot scores are means over capped validation splits, so they compare only with one another.
    """
    most = max((outcome.row.shots for outcome in outcomes), key=lambda n: float("inf") if n == "all" else int(n))
    exported = [outcome for outcome in outcomes if outcome.model_uri is not None and outcome.row.shots == most]
    return max(exported, key=lambda outcome: score_of(state, outcome), default=None)
