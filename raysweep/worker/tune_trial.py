"""One Tune trial: a Population in one Train run, or the test of what a group's studies chose."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from raysweep.errors import RaysweepError
from raysweep.paths import write_atomically
from raysweep.storage import local_path

Results = list[dict[str, Any]]
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED")


def run_work(work: dict[str, Any], jobs: dict[str, dict[str, Any]]) -> None:
    """Tune's trainable: does a piece of a group's work and reports its `results`, or the `error` that ended it.

    An error is reported rather than raised, so that the study's journal can say what went wrong, and a reused actor
    lives on.
    """
    from ray import tune

    job = jobs[work["group"]]
    try:
        from raysweep.worker.evaluate import run_test

        if "trials" in work:
            train, size = partial(_train, work["trials"], job), work["micro_batch_size"]
            results: dict[str, Any] = {"trials": within_memory(train, size, rows_to_begin_with(job))}
        else:
            results = {"tested": run_test(job, work["test"], work["baselines"])}
        tune.report({"results": json.dumps(results)})
    except Exception as error:
        if "trials" in work:
            name = str(work["trials"][0]["number"])
            study = job["studies"][work["trials"][0]["study"]]
        else:
            name, study = "test", job["studies"][[*work["test"], *work["baselines"]][0]]
        with suppress(RaysweepError, OSError):  # the storage may be what is at fault
            write_atomically(local_path(study["folder"]) / "trials" / name / "error.txt", traceback.format_exc())
        if lost_a_worker(error):
            raise  # nobody's setting is at fault: Tune runs the work again where there are other nodes
        reason = " ".join(str(error).split()) or "no message"
        tune.report({"error": f"{type(error).__name__}: {reason[:500]}"})


def rows_to_begin_with(job: dict[str, Any]) -> int:
    """Rows of a batch that one worker trains on at once, where memory has not run out."""
    from raysweep.training.loop import CPU_MICRO_BATCH

    share: int = math.ceil(job["loop"]["batch_size"] / job["num_workers"])
    return min(job["loop"]["micro_batch_size"] or (share if job["use_gpu"] else CPU_MICRO_BATCH), share)


def within_memory(train: Callable[[int | None], Results], micro_batch_size: int | None, share: int) -> Results:
    """Trains, and again with micro-batches of half the size each time that memory runs out.

    Starting the Train run again, rather than the step, needs no agreement among workers of which one has run out while
    the others wait for its gradients; it goes on from the last epoch's checkpoint.

    Args:
        train: trains with micro-batches of a size; None for all rows of a worker's share at once.
        micro_batch_size: to begin with.
        share: rows of a batch that one worker trains on.
    """
    while True:
        try:
            return train(micro_batch_size)
        except Exception as error:
            if not ran_out_of_memory(error) or (micro_batch_size or share) == 1:
                raise
        # Out here the error is gone, and with it the frames that hold the model.
        micro_batch_size = math.ceil((micro_batch_size or share) / 2)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether this, or what a worker of a Train run raised, is about memory; Ray's own error of a host's counts too."""
    # By words: CUDA's libraries raise plain RuntimeErrors. Of a worker's error Ray keeps only ends in its own text.
    return any(words in f"{type(one).__name__} {one}" for one in _causes(error) for words in OUT_OF_MEMORY)


def lost_a_worker(error: Exception) -> bool:
    """Whether a worker process of a Train run died, or its node did, without running out of memory."""
    from ray.exceptions import RayActorError

    causes = [getattr(one, "health_check_failure", one) for one in _causes(error)]
    return any(isinstance(one, RayActorError) for one in causes) and not ran_out_of_memory(error)


def _causes(error: Exception) -> list[Exception]:
    """An error, and those of the workers where it is a Train run's."""
    return [error, *getattr(error, "worker_failures", {}).values()]


def _train(trials: list[dict[str, Any]], job: dict[str, Any], micro_batch_size: int | None) -> Results:
    """Runs a Population through Ray Train.

    One worker runs in Train's local mode, inside the Tune trial, whose actor is reused: a Train run of its own costs
    seconds to start. Several workers get a full TorchTrainer, whose reports are passed on.
    """
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raysweep.worker.train import train_worker

    loop_config: dict[str, Any] = {"job": job, "trials": trials, "micro_batch_size": micro_batch_size}
    if job["num_workers"] == 1:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=loop_config | {"report": tune.report},
            scaling_config=ScalingConfig(num_workers=0, use_gpu=job["use_gpu"]),
        )
    else:
        from ray.tune.integration.ray_train import TuneReportCallback

        # Named after its trials, so that Train's own recovery finds the run again.
        name = f"trials-{trials[0]['number']}-{trials[-1]['number']}-{micro_batch_size or 'all'}"
        folder = local_path(job["studies"][trials[0]["study"]]["folder"])
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=loop_config | {"report": None},
            scaling_config=ScalingConfig(
                num_workers=job["num_workers"],
                use_gpu=job["use_gpu"],
                resources_per_worker=worker_resources(job),
                placement_strategy=job["placement"],
            ),
            run_config=RunConfig(name=name, storage_path=f"{folder}/train", callbacks=[TuneReportCallback()]),
        )
    results: Results = trainer.fit().return_value
    return results


def worker_resources(job: dict[str, Any]) -> dict[str, float]:
    """What one worker holds, in Ray's terms."""
    gpus = {"GPU": job["gpus_per_worker"]} if job["use_gpu"] else {}
    return {"CPU": job["cpus_per_worker"], **gpus}


def work_resources(job: dict[str, Any], work: dict[str, Any]) -> dict[str, float]:
    """What a Tune trial itself holds.

    With several workers that is next to nothing while they train, since Train's placement group lies outside of it; Ray
    refuses an empty bundle, and a fraction of a CPU would keep the last worker from ever fitting.
    """
    trains_elsewhere = job["num_workers"] > 1 and "trials" in work
    return {"memory": 1} if trains_elsewhere else worker_resources(job)
