"""Experiment trackers: MLflow where the environment names its server, Weights & Biases where a project is asked for.

A tracker that cannot be reached refuses the run before it has begun; later it is given up, and training continues.
"""

import os
from collections.abc import Callable
from typing import Any

from components.config import TrainConfig
from components.runtime.errors import Tune16Error, first_line
from components.runtime.steps import say

Log = Callable[[dict[str, float], int], object]
End = Callable[[bool], object]


class Trackers:
    """What is told of each log entry, as ``train/loss`` and ``eval/loss``.

    Raises:
        Tune16Error: Weights & Biases is asked for without an API key, or a tracker cannot be reached.
    """

    def __init__(self, config: TrainConfig, facts: dict[str, Any]) -> None:
        settings = {**config.model_dump(), "model": facts["model"]}
        self._logs: dict[str, Log] = {}
        self._ends: dict[str, End] = {}
        for name, wanted, begin in (
            ("MLflow", os.environ.get("MLFLOW_TRACKING_URI"), self._begin_mlflow),
            ("Weights & Biases", config.wandb_project, self._begin_wandb),
        ):
            if wanted:
                try:
                    self._logs[name], self._ends[name] = begin(config, settings)
                except Tune16Error:
                    raise
                except Exception as error:  # each library has errors of its own
                    raise Tune16Error(
                        f"train: {name} does not take this run ({first_line(error)}). Check its address and its "
                        "token, or run without it."
                    ) from None

    def log(self, entry: dict[str, Any]) -> None:
        """Pass on a log entry's numbers."""
        kind = "eval" if "eval_loss" in entry else "train"
        numbers = {f"{kind}/{name.removeprefix('eval_')}": value for name, value in entry.items() if name != "step"}
        for name, log in list(self._logs.items()):
            self._call(name, lambda log=log: log(numbers, entry["step"]))  # type: ignore[misc]

    def end(self, has_failed: bool) -> None:
        """Close the runs as finished or as failed, so that all that was logged arrives."""
        for name, end in self._ends.items():
            self._call(name, lambda end=end: end(has_failed))  # type: ignore[misc]
        self._ends = {}

    def _call(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # as above
            self._logs.pop(name, None)
            say("train", f"{name} does not answer ({first_line(error)}); training continues without it")

    @staticmethod
    def _begin_mlflow(config: TrainConfig, settings: dict[str, Any]) -> tuple[Log, End]:
        import mlflow

        def end(has_failed: bool) -> None:
            mlflow.end_run("FAILED" if has_failed else "FINISHED")

        mlflow.start_run()  # the experiment is MLFLOW_EXPERIMENT_NAME's
        mlflow.log_params(settings)
        return lambda numbers, step: mlflow.log_metrics(numbers, step=step), end

    @staticmethod
    def _begin_wandb(config: TrainConfig, settings: dict[str, Any]) -> tuple[Log, End]:
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
            raise Tune16Error(
                "train.wandb_project: is set, but WANDB_API_KEY is not in the environment. Put it into the Secret "
                "that with_tokens_secret names, or set WANDB_MODE=offline."
            )
        import wandb

        run = wandb.init(project=config.wandb_project, config=settings)
        return lambda numbers, step: run.log(numbers, step=step), lambda failed: run.finish(exit_code=int(failed))
