"""Two processes make two versions champion under one number at the same moment: one wins, the other says who."""

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from components.runtime.errors import Tune16Error
from components.storage import s3, versions
from pipelines.s3server import S3Server
from tests.faults.harness import report

BUCKET = "tune16"
PATH = "team/model"


def main() -> int:
    """Race, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=100, help="races")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        S3Server(Path(scratch)) as server,
        s3.environment(server.environment(BUCKET)),
    ):
        races = _race(options.num)
        log = versions.read_log(PATH, newest=options.num + 1)
    one_won = sum(sorted(won for won, _, _ in race) == [False, True] for race in races)
    named = sum(_loser_names_winner(race) for race in races)
    in_log = [champion.version for champion in reversed(log)] == [_winner(race) for race in races]
    figures = {"races": len(races), "exactly one won": one_won, "the other says who": named, "log as won": in_log}
    return report("champion_races", figures, one_won == named == options.num and in_log, options.output)


def _race(num: int) -> list[list[tuple[bool, str, str]]]:
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(2), fork.Queue()
    runners = [fork.Process(target=_run, args=(name, num, barrier, results)) for name in ("a", "b")]
    for runner in runners:
        runner.start()
    races: list[list[tuple[bool, str, str]]] = [[] for _ in range(num)]
    for _ in range(2 * num):
        number, *outcome = results.get(timeout=60)
        races[number].append(tuple(outcome))
    for runner in runners:
        runner.join()
    return races


def _run(name: str, num: int, barrier: Any, results: Any) -> None:
    if name == "a":
        s3.client().create_bucket(Bucket=BUCKET)
    barrier.wait()
    for number in range(num):
        version = f"{number:06d}-{name}"
        versions.write_manifest(
            PATH, version, {"version": version, "address": versions.address(PATH, version), "files": []}
        )
        before = versions.read_champion(PATH)
        barrier.wait()
        try:
            versions.append_champion(PATH, version, before)
            results.put((number, True, version, ""))
        except Tune16Error as error:
            results.put((number, False, version, str(error)))
        barrier.wait()


def _winner(race: list[tuple[bool, str, str]]) -> str:
    return next((version for won, version, _ in race if won), "")


def _loser_names_winner(race: list[tuple[bool, str, str]]) -> bool:
    return any(_winner(race) in said and "process" in said for won, _, said in race if not won)


if __name__ == "__main__":
    raise SystemExit(main())
