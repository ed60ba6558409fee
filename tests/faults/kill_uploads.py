"""kill -9 of a publication at random moments: readers never see part of a model, and the rerun leaves nothing behind.

A process of its own reads all the time: whatever has a manifest has to verify.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from components.config import UploadConfig
from components.runtime.errors import Tune16Error
from components.storage import s3, transfer, versions
from components.upload.publisher import publish
from pipelines.s3server import S3Server
from tests.faults.harness import after, child, kills, report
from tests.faults.outputs import Outputs, write_outputs

BUCKET = "tune16"
ROOT = "team"


def main() -> int:
    """Kill, start again, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=200, help="kills")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = random.Random(1)
    transfer.PART_BYTES = 5 * 2**20  # the smallest that servers take
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with S3Server(folder / "s3") as server, s3.environment(server.environment(BUCKET)):
            s3.client()  # made here, used by children only: connections do not survive a fork
            _must(lambda: s3.client().create_bucket(Bucket=BUCKET), folder)
            outputs = write_outputs(folder / "outputs", 6 * 2**20)
            started = time.monotonic()
            _must(lambda: _publish(outputs, "undisturbed"), folder)
            seconds = time.monotonic() - started
            reader = _start_reader(folder)
            outcomes = kills(options.num, lambda number: _kill(outputs, number, folder, rng.uniform(0.05, 1) * seconds))
            os.kill(reader, signal.SIGTERM)
            is_well = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0
        num_reads, num_broken = map(int, (folder / "reads").read_text().split())
    killed = [outcome for outcome in outcomes if outcome["killed"]]
    figures = {
        "kills": len(killed),
        "publications that had ended first": len(outcomes) - len(killed),
        "with files or parts left": sum(outcome["left"] for outcome in outcomes),
        "of these gone on with": sum(outcome["resumed"] for outcome in outcomes),
        "nothing left after a kill and the rerun": sum(outcome["clean"] for outcome in killed),
        "complete versions read meanwhile": num_reads,
        "of these not whole": num_broken,
    }
    is_clean = all(outcome["clean"] for outcome in outcomes)
    return report("kill_uploads", figures, is_clean and is_well and not num_broken, options.output)


def _must(work: object, folder: Path) -> None:
    assert child(work, folder / "log") == 0, (folder / "log").read_text()  # type: ignore[arg-type]


def _publish(outputs: Outputs, name: str) -> None:
    publish(*outputs, UploadConfig(path=f"{ROOT}/{name}"))


def _kill(outputs: Outputs, number: int, folder: Path, seconds: float) -> dict[str, bool]:
    name, log, found = f"model-{number}", folder / f"log-{number}", folder / f"found-{number}"
    code = child(lambda: _publish(outputs, name), log, after(seconds))
    again = child(lambda: found.write_text(_publish_again(outputs, name)), log)
    words = found.read_text().split() if again == 0 else []
    outcome = {"killed": code == -9, **{word: word in words for word in ("left", "resumed", "clean")}}
    if not outcome["clean"]:
        print(log.read_text(), words, flush=True)
    return outcome


def _publish_again(outputs: Outputs, name: str) -> str:
    """What was left, whether it was gone on with, and whether all is well: in words."""
    path = f"{ROOT}/{name}"
    left = _unfinished(name)
    _publish(outputs, name)
    champion = versions.champion_version(path)
    with tempfile.TemporaryDirectory() as scratch:
        versions.download(path, champion, Path(scratch) / "copy")
    is_clean = not _unfinished(name) and not s3.unfinished_keys(BUCKET, "")
    versions.remove(path, champion)
    return " ".join(("left" if left else "", "resumed" if left == [champion] else "", "clean" if is_clean else ""))


def _unfinished(name: str) -> list[str]:
    """Versions without manifest, of which there is a file or a part."""
    path = f"{ROOT}/{name}/"
    keys = [stored.key for stored in s3.list_objects(BUCKET, path)]
    complete = {key.split("/")[2] for key in keys if key.endswith(versions.MANIFEST)}
    keys += s3.unfinished_keys(BUCKET, path)
    return sorted({key.split("/")[2] for key in keys} - complete - {"champions", "lease"})


def _start_reader(folder: Path) -> int:
    pid = os.fork()
    if not pid:
        ends: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: ends.append(1))
        num_reads = num_broken = 0
        try:
            while not ends:
                num_whole, num_torn = _read_all(folder / "copy")
                num_reads, num_broken = num_reads + num_whole + num_torn, num_broken + num_torn
                time.sleep(0.05)
            (folder / "reads").write_text(f"{num_reads} {num_broken}")
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _read_all(copy: Path) -> tuple[int, int]:
    """Read every version that has a manifest: the number of whole ones, and of others."""
    whole = torn = 0
    for stored in s3.list_objects(BUCKET, f"{ROOT}/model-"):
        if not stored.key.endswith(versions.MANIFEST):
            continue
        _, name, version, _ = stored.key.split("/")
        try:
            versions.download(f"{ROOT}/{name}", version, copy)
            whole += 1
        except Tune16Error as error:
            if s3.read(BUCKET, stored.key) is not None:  # not one that this script has just removed
                torn += 1
                print(error, flush=True)
    return whole, torn


if __name__ == "__main__":
    raise SystemExit(main())
