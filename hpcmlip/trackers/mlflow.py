"""MLflow. Without a server, a database RUN/mlflow.db, for `mlflow server --backend-store-uri sqlite:///RUN/mlflow.db`."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at import

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from hpcmlip.trackers import FINISHED, STOPPED, Run

COMPONENT = "MLflow"

_TAG = "hpcmlip.run"
"""MLflow numbers runs itself; under this tag a run is found again."""
_STATES = {FINISHED: "FINISHED", STOPPED: "KILLED"}
_MOST_PARAMS = 100
"""MLflow's limit for one call."""


class Tracker:
    """An MLflow run that every start of the run continues."""

    def __init__(self, run: Run):
        self._client = MlflowClient(tracking_uri=run.server or "sqlite:///mlflow.db")
        experiment = self._experiment(run.project)
        found = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        self._id = (found[0] if found else self._create(experiment, run)).info.run_id
        self._client.update_run(self._id, status="RUNNING")

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:  # another member was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def _create(self, experiment: str, run: Run) -> MlflowRun:
        created = self._client.create_run(experiment, run_name=run.name, tags={_TAG: run.id, "group": run.group})
        params = [Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(created.info.run_id, params=params[first : first + _MOST_PARAMS])
        return created

    def log(self, step: int, time: float, figures: dict[str, float]) -> None:
        metrics = [Metric(key, value, int(1000 * time), step) for key, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, end: str) -> None:
        self._client.set_terminated(self._id, _STATES.get(end, "FAILED"))
