"""The plan of a sweep, for `--dry-run`: its studies, images and resources. Does not start Ray."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from raysweep.cluster.resources import Resources, check_resources, num_concurrent_trials, uses_gpu
from raysweep.errors import ResourceError
from raysweep.experiment.config import Experiment
from raysweep.experiment.search_blocks import population_size
from raysweep.results.leaderboard import describe_seconds, uneven_warning

if TYPE_CHECKING:
    from raysweep.images.index import ImageIndex


def cluster_lines(present: Resources) -> list[str]:
    """Returns lines with the CPUs and GPUs of a cluster: in total, and by kind of node."""
    kinds = Counter(present.by_node)
    lines = [f"cluster: {present.num_nodes} nodes, {present.num_cpus} CPUs, {present.num_gpus} GPUs"]
    for (num_cpus, num_gpus), count in sorted(kinds.items(), reverse=True):
        lines.append(f"  {count} with {num_cpus} CPUs and {num_gpus} GPUs")
    return lines


def plan_lines(experiment: Experiment, index: ImageIndex, present: Resources, *, may_grow: bool = False) -> list[str]:
    """Returns lines with the plan of a sweep, for `--dry-run`: images, studies, passes, resources.

    Args:
        experiment: the planned experiment.
        index: its images.
        present: resources that are there now.
        may_grow: whether more nodes may join.

    Raises:
        ResourceError: the plan cannot run on the present resources, and no nodes may join.
    """
    lacking = ""
    try:
        check_resources(experiment.resources, present)
    except ResourceError as error:
        if not may_grow:
            raise
        lacking = str(error)
    lines = ["images:"]
    for split, by_class in index.counts().items():
        classes = ", ".join(f"{name} {number}" for name, number in by_class.items())
        lines.append(f"  {split}: {sum(by_class.values()):,} ({classes})")
    warnings = [*index.warnings, *filter(None, [uneven_warning(index.counts())])]
    lines += [f"  warning: {warning}" for warning in warnings]
    lines.append("studies:")
    for study in experiment.studies():
        block = experiment.search.block(study.mode)
        size = population_size(block)
        rounds = -(-block.num_trials // size)
        work = f"{block.num_trials} trials in {rounds} Populations of up to {size}" if size > 1 else ""
        budget = f", at most {describe_seconds(block.time_budget_s)}" if block.time_budget_s else ""
        stopped = f", bad trials stopped early by {block.scheduler}" if block.scheduler != "none" else ""
        lines.append(f"  {study.name}: {work or f'{block.num_trials} trials'} ({block.sampler}{stopped}{budget})")
        if baselines := experiment.baselines_of(study):
            lines.append(f"    and {', '.join(one.kind for one in baselines)} on the same features")
    probed = {study.encoder_name for study in experiment.studies() if study.reads_features}
    lines.append(f"encoder passes for probes: {len(probed)} at most (one per encoder; none where features are cached)")
    resources = experiment.resources
    needed = f"{resources.num_workers} x {resources.cpus_per_worker} CPUs"
    if uses_gpu(resources, present):
        needed += f" and {resources.num_workers} x {resources.gpus_per_worker:g} GPUs"
    lines.append(f"resources: a training run needs {needed}; present: {present.num_cpus} CPUs, {present.num_gpus} GPUs")
    if lacking:
        return [*lines, f"  not there yet, and waited for, at most {resources.wait_for_nodes_s:g} s: {lacking}"]
    side_by_side = num_concurrent_trials(resources, present)
    return [*lines, f"  up to {side_by_side} training runs side by side; Populations of one encoder one by one"]
