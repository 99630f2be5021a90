"""MLflow's logged models and registered models, written through the client only.

MLflow's `log_model` and `register_model` take the experiment, the run and the store from global state: a model would
get into the experiment "Default" of a local store, and fail where that experiment was deleted.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.results.environment import package_version
from raysweep.storage.paths import signature

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MODEL_URI = "raysweep.model_uri"
CONTENT = "raysweep.content"  # signature of the model folder's descriptions
PREFIX = "models:/"
ALIAS = "best"  # of the version that the last sweep has registered: models:/NAME@best
REQUIREMENTS = ("raysweep", "torch", "transformers", "pillow")


def log_model(client: MlflowClient, run_id: str, folder: Path, classes: Sequence[str], name: str = "model") -> str:
    """Logs an exported model of a run, in the run's experiment, as a pyfunc; returns its URI.

    A model that the run has is not logged again. One whose upload was cut short is completed.

    Args:
        client: client of the store.
        run_id: id of the run.
        folder: the model folder from `export_model`.
        classes: class names, in the order of the logits.
        name: name of the model in the UI.
    """
    from mlflow.entities import LoggedModelOutput

    content = signature([path.read_text() for path in sorted(folder.glob("*.json"))])
    run = client.get_run(run_id)
    model = _find(client, run.info.experiment_id, run_id, content)
    if model is None:
        tags = {CONTENT: content}
        model = client.create_logged_model(run.info.experiment_id, model_name(name), run_id, tags, run.data.params)
    if model.status != "READY":
        with tempfile.TemporaryDirectory() as temporary:
            _save_pyfunc(Path(temporary) / "model", folder, classes, model, run_id)
            client.log_model_artifacts(model.model_id, str(Path(temporary) / "model"))
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in {output.model_id for output in outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_uri)


def model_name(text: str) -> str:
    """Returns a text without the characters that MLflow does not allow in the name of a model."""
    return re.sub(r"[/:.%\"']", "-", text) or "model"


def _find(client: MlflowClient, experiment_id: str, run_id: str, content: str) -> LoggedModel | None:
    """Returns the run's logged model with this content, a complete one first; None if there is none."""
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    own = [model for model in found if model.tags.get(CONTENT) == content]
    return min(own, key=lambda model: model.status != "READY", default=None)


def _save_pyfunc(target: Path, folder: Path, classes: Sequence[str], model: LoggedModel, run_id: str) -> None:
    """Writes an exported model as MLflow's folder of a pyfunc, with a loader module, so that no pickle is written."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    numbers = ["probability", *(f"probability_{name}" for name in classes)]
    outputs = Schema([ColSpec(DataType.string, "label"), *(ColSpec(DataType.double, name) for name in numbers)])
    mlflow.pyfunc.save_model(
        target,
        loader_module="raysweep.results.model",
        data_path=str(folder),
        mlflow_model=Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
        ),
        signature=ModelSignature(Schema([ColSpec(DataType.binary, "image")]), outputs),
        pip_requirements=[f"{name}=={package_version(name)}" for name in REQUIREMENTS],
    )


def register_model(client: MlflowClient, model_uri: str, name: str) -> str:
    """Registers a logged model, unless a version has it already; gives it the alias `best`; returns the version."""
    from mlflow import MlflowException

    for known in client.search_model_versions(f"name = '{name}'"):
        if known.tags.get(MODEL_URI) == model_uri:
            client.set_registered_model_alias(name, ALIAS, known.version)
            return str(known.version)
    with suppress(MlflowException):  # it exists already; if not, the next call raises
        client.create_registered_model(name)
    model = client.get_logged_model(model_uri.removeprefix(PREFIX))
    # Not from `model_uri`: a SQLite store looks that up in the global tracking URI.
    version = client.create_model_version(
        name,
        model.artifact_location,
        run_id=model.source_run_id,
        tags={MODEL_URI: model_uri},
        model_id=model.model_id,
    )
    client.set_registered_model_alias(name, ALIAS, version.version)
    return str(version.version)
