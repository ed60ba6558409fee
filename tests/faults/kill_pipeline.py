"""kill -9 of a whole local run at random moments: started again, it ends with the same model, and does nothing twice.

All files that are published must have the SHA-256 of an undisturbed run's, but for those that tell measured seconds.
"""

import argparse
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (all that children need is imported before they are forked)
import kfp  # noqa: F401

from components.config import Recipe
from components.storage import s3, versions
from pipelines.finetune import finetune  # noqa: F401
from pipelines.local import BUCKET, LOG, find_interrupted, run_locally
from pipelines.s3server import S3Server
from tests.faults.harness import after, child, kills, report, write_model

PATH = "team/model"
NUM_ROWS = 160
_WITH_SECONDS = {"adapter/report.html", "adapter/tune16.json", "report/gguf.html", "report/training.html"}


def main() -> int:
    """Kill, start again, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=30, help="kills")
    parser.add_argument("--quantizations", default="Q8_0", help="GGUF files to make; empty: none")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = _recipe(folder, options.quantizations)
        started = time.monotonic()
        wanted = _undisturbed(folder / "undisturbed", recipe)
        seconds = time.monotonic() - started
        outcomes = kills(
            options.num,
            lambda number: _kill(folder / str(number), recipe, wanted, rng.uniform(0.05, 0.98) * seconds),
        )
    killed = [outcome for outcome in outcomes if outcome["killed"]]
    figures = {
        "kills": len(killed),
        "runs that had ended first": len(outcomes) - len(killed),
        "seconds of an undisturbed run": round(seconds, 1),
        "files compared": len(wanted),
        "files that tell seconds": len(_WITH_SECONDS),
        "same files after a kill": sum(outcome["same"] for outcome in killed),
        "complete steps done again": sum(len(outcome["twice"]) for outcome in outcomes),
        "steps complete when killed": sum(len(outcome["complete"]) for outcome in killed),
    }
    reached = all(outcome["same"] and not outcome["twice"] for outcome in outcomes)
    return report("kill_pipeline", figures, reached, options.output)


def _recipe(folder: Path, quantizations: str) -> Recipe:
    from pipelines.demo.generate import ORDERS

    assert child(lambda: write_model(folder / "model"), folder / "log") == 0, (folder / "log").read_text()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(ORDERS.read_text().splitlines(keepends=True)[:NUM_ROWS]))
    return Recipe.model_validate(
        {
            "preflight": {"model": str(folder / "model"), "data": str(rows)},
            "prepare": {"max_tokens": 128, "held_out_share": 0.1},
            "train": {"epochs": 3, "rank": 8, "learning_rate": 5e-3, "micro_batch": 4, "dropout": 0},
            "evaluate": {"num_prompts": 10, "max_new_tokens": 8},
            "convert": {"quantizations": quantizations},
            "upload": {"path": PATH},
        }
    )


def _undisturbed(runs: Path, recipe: Recipe) -> dict[str, str]:
    runs.mkdir()
    assert child(lambda: _run(runs, recipe), runs / "log") == 0, (runs / "log").read_text()
    return _published(runs / "run")


def _kill(runs: Path, recipe: Recipe, wanted: dict[str, str], seconds: float) -> dict[str, Any]:
    runs.mkdir()
    code = child(lambda: _run(runs, recipe), runs / "log", after(seconds))
    complete = _complete(runs / "run")
    before = len(_log(runs / "run"))
    again = child(lambda: _run(runs, recipe), runs / "log")
    outcome = {
        "killed": code == -9,
        "seconds": round(seconds, 1),
        "complete": sorted(complete),
        "twice": sorted(complete & _started(_log(runs / "run")[before:])) if code == -9 else [],
        "same": again == 0 and _published(runs / "run") == wanted,
    }
    if not outcome["same"] or outcome["twice"]:
        print((runs / "log").read_text()[-5000:])
    return outcome


def _run(runs: Path, recipe: Recipe) -> None:
    """As `tune16 run` does it, in a folder of known name."""
    folder = find_interrupted(runs, recipe) or runs / "run"
    run_locally(recipe, folder, lambda step, text: None)


def _published(run: Path) -> dict[str, str]:
    """SHA-256 of every file of the champion that tells no seconds; nothing lies beside it."""
    with S3Server(run / "s3") as server, s3.environment(server.environment(BUCKET)):
        champion = versions.read_champion(PATH)
        assert champion and champion.number == 1
        manifest = versions.read_manifest(PATH, champion.version)
        found = [stored.key.removeprefix(f"{PATH}/") for stored in s3.list_objects(BUCKET, f"{PATH}/")]
        folders = {key.partition("/")[0] for key in found} - {"lease"}
        assert folders == {"champions", champion.version}, folders
    return {file["path"]: file["sha256"] for file in manifest["files"] if file["path"] not in _WITH_SECONDS}


def _log(run: Path) -> str:
    return (run / LOG).read_text() if (run / LOG).is_file() else ""


def _complete(run: Path) -> set[str]:
    """Steps whose end has been taken note of, in kfp's cache."""
    return set(
        re.findall(r"/tune16-[^/]+/(\w+)/", "".join(path.read_text() for path in run.glob("steps/.kfp_cache/*.json")))
    )


def _started(log: str) -> set[str]:
    return set(re.findall(r"^ +(\w+): started", log, re.MULTILINE))


if __name__ == "__main__":
    raise SystemExit(main())
