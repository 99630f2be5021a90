"""One Tune trial: a Population in one Train run, and the test rows of the study's best."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

from raysweep.paths import write_atomically
from raysweep.worker import predict_test_rows, train_worker


def run_population(config: dict[str, Any], job: dict[str, Any]) -> None:
    """Tune's trainable: trains one Population and reports every trial's `results`, or the `error` that ended it.

    An error is reported rather than raised, so that the study's journal can say what went wrong, and a reused actor
    lives on.
    """
    from ray import tune

    try:
        tune.report({"results": json.dumps(_train(config["trials"], job))})
    except Exception as error:
        folder = Path(job["folder"]) / "trials" / str(config["trials"][0]["number"])
        write_atomically(folder / "error.txt", traceback.format_exc())
        reason = " ".join(str(error).split()) or "no message"
        tune.report({"error": f"{type(error).__name__}: {reason[:500]}"})


def _train(trials: list[dict[str, Any]], job: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a Population through Ray Train.

    One worker runs in Train's local mode, inside the Tune trial, whose actor is reused: a Train run of its own costs
    seconds to start. Several workers get a full TorchTrainer, whose reports are passed on.
    """
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    loop_config: dict[str, Any] = {"job": job, "trials": trials}
    if job["num_workers"] == 1:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=loop_config | {"report": tune.report},
            scaling_config=ScalingConfig(num_workers=0, use_gpu=job["use_gpu"]),
        )
    else:
        from ray.tune.integration.ray_train import TuneReportCallback

        # Named after its trials, so that Train's own recovery finds the run again.
        name = f"trials-{trials[0]['number']}-{trials[-1]['number']}"
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=loop_config | {"report": None},
            scaling_config=ScalingConfig(
                num_workers=job["num_workers"], use_gpu=job["use_gpu"], resources_per_worker=worker_resources(job)
            ),
            run_config=RunConfig(name=name, storage_path=f"{job['folder']}/train", callbacks=[TuneReportCallback()]),
        )
    results: list[dict[str, Any]] = trainer.fit().return_value
    return results


def worker_resources(job: dict[str, Any]) -> dict[str, float]:
    """What one worker holds, in Ray's terms."""
    gpus = {"GPU": job["gpus_per_worker"]} if job["use_gpu"] else {}
    return {"CPU": job["cpus_per_worker"], **gpus}


def trial_resources(job: dict[str, Any]) -> dict[str, float]:
    """What a Tune trial itself holds.

    With several workers that is next to nothing, since Train's placement group lies outside of it; Ray refuses an
    empty bundle, and a fraction of a CPU would keep the last worker from ever fitting.
    """
    return worker_resources(job) if job["num_workers"] == 1 else {"memory": 1}


def run_test(job: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Evaluates the test rows once: probes in this process, from cached features; the rest on a worker's device."""
    if job["mode"] == "linear_probe":
        return predict_test_rows(job | {"use_gpu": False}, checkpoint)
    import ray

    resources = worker_resources(job)
    task = ray.remote(predict_test_rows).options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
    result: dict[str, Any] = ray.get(task.remote(job, checkpoint))
    return result
