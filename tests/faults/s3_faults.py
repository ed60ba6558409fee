"""Faults between this machine and S3: a publication ends verified, or with a message; none goes wrong silently."""

import argparse
import random
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.retries.standard import ExponentialBackoff

from components.config import UploadConfig
from components.runtime import retry as again
from components.runtime.errors import Tune16Error
from components.storage import s3, transfer, versions
from components.upload.publisher import publish
from pipelines.s3server import S3Server
from tests.faults.harness import report
from tests.faults.outputs import Outputs, write_outputs
from tests.faults.proxy import FAULTS, Plan, proxy

BUCKET = "tune16"
LIMIT_SECONDS = 90.0
# Share of the requests that are hit, and how many at most: one, some, many, all.
_EXTENTS = ((0.1, 1), (0.1, 5), (0.4, 20), (1.0, 60))


def main() -> int:
    """Break, publish, download, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=300, help="scenarios")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    _hurry()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        outputs = write_outputs(folder / "small"), write_outputs(folder / "large", 6 * 2**20)
        with S3Server(folder / "s3") as server, proxy(server.endpoint) as between:
            direct = server.environment(BUCKET)
            through = {**direct, "AWS_S3_ENDPOINT": f"http://127.0.0.1:{between.server_port}"}
            with s3.environment(direct):
                s3.client().create_bucket(Bucket=BUCKET)
            endings = []
            for number in range(options.num):
                rng = random.Random(number)
                share, at_most = _EXTENTS[number // len(FAULTS) % len(_EXTENTS)]
                between.plan = Plan(FAULTS[number % len(FAULTS)], share, at_most, rng)
                started = time.monotonic()
                with s3.environment(through):
                    ending = _ending(outputs[number % 5 == 0], f"team/model-{number}", folder)
                seconds = time.monotonic() - started
                between.plan = Plan()
                with s3.environment(direct):
                    ending = _checked(ending, outputs[number % 5 == 0], f"team/model-{number}", folder, seconds)
                fault = FAULTS[number % len(FAULTS)]
                endings.append((fault, ending.partition(":")[0]))
                print(f"{number + 1}: {fault}, {share:.0%}, at most {at_most}, {seconds:.1f} s: {ending}", flush=True)
    counts = Counter(ending for _, ending in endings)
    figures: dict[str, Any] = {"scenarios": len(endings), **counts}
    figures["by fault"] = {fault: dict(Counter(end for name, end in endings if name == fault)) for fault in FAULTS}
    is_reached = counts["verified"] + counts["message"] == options.num and bool(counts["verified"])
    return report("s3_faults", figures, is_reached, options.output)


def _hurry() -> None:
    """Short pauses and time-outs, small parts: the same roads in less time."""
    transfer.PART_BYTES = 5 * 2**20
    again._FIRST_PAUSE_SECONDS = 0.01
    s3._SETTLED_SECONDS = 0.05
    ExponentialBackoff.delay_amount = lambda *_: 0.01
    s3.Config = lambda **options: Config(**{**options, "read_timeout": 0.6, "connect_timeout": 2})  # type: ignore[misc]


def _ending(outputs: Outputs, path: str, folder: Path) -> str:
    try:
        version = publish(*outputs, UploadConfig(path=path))["version"]
        versions.download(path, version, folder / "copy")
    except Tune16Error as error:
        return f"message: {error}" if "\n" not in str(error) else f"of several lines: {error}"
    except Exception:
        return f"traceback: {traceback.format_exc()}"
    return "verified"


def _checked(ending: str, outputs: Outputs, path: str, folder: Path, seconds: float) -> str:
    """The ending, as the server itself has it: what has a manifest is whole, and the weights are those published."""
    if seconds > LIMIT_SECONDS:
        return f"too late: {ending}"
    keys = [stored.key.split("/") for stored in s3.list_objects(BUCKET, f"{path}/")]
    for parts in keys:
        if parts[3:] == [versions.MANIFEST]:
            try:
                copy = versions.download(path, parts[2], folder / "direct")
            except Tune16Error as error:
                return f"silent: {error}"
            weights = Path("merged/model.safetensors")
            if (copy / weights).read_bytes() != (outputs[0] / weights).read_bytes():
                return "silent: other weights"
    champion = versions.read_champion(path)
    if ending == "verified" and champion is None:
        return "silent: no champion"
    if champion and [path.split("/")[0], path.split("/")[1], champion.version, versions.MANIFEST] not in keys:
        return "silent: the champion is not there"
    return ending


if __name__ == "__main__":
    raise SystemExit(main())
