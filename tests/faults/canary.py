"""A canary for a secret in every variable and file that holds one; then everything is run, well and badly.

No canary may be found in what is printed, logged, reported, kept on disk or in S3: not as it is, nor as URLs and base64
write it. The S3 server's own secret is one of them, so that the good run is a real one.
"""

import argparse
import base64
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import yaml

from components.config import CONNECTION_VARIABLES, TOKEN_VARIABLES
from components.storage import s3
from pipelines.demo.generate import ORDERS
from pipelines.s3server import S3Server
from tests.faults.harness import report, write_model
from tests.pipelines.conftest import furnish, secret
from tests.servers import KubernetesApi, PipelineApi

BUCKET = "tune16"
PATH = "team/model"
VARIABLES = (
    *TOKEN_VARIABLES,
    *("AWS_SESSION_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "TUNE16_TOKEN"),
    *("OPENAI_API_KEY", "DB_PASSWORD", "SIGNING_KEY", "TUNE16_CHAT_TOKEN"),
)
_WRONG = "c4nary-that-is-wrong"
_ANY = -1  # the doctor's exit code tells what the namespace lacks, which is not asked here
_STEPS = ("-m", "components")
_TUNE16 = ("-m", "pipelines.cli")
_BUG = (
    "import os\nfrom components.runtime.steps import step\n"
    "with step('merge'):\n    raise RuntimeError(dict(os.environ))"
)
_BUG_OF_COMMAND = (
    "import os\nfrom pipelines import cli\ncli.find_recipe = lambda name: int(str(os.environ))\ncli.main()"
)


@dataclass(frozen=True)
class Command:
    """What is run, its exit code if all is right, and the variables that it has beyond the others."""

    name: str
    arguments: tuple[str, ...]
    code: int = 2
    variables: tuple[tuple[str, str], ...] = ()


def main() -> int:
    """Run everything, and look everywhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=0, help="commands to run, the quick ones first; 0: all")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, S3Server(Path(scratch) / "s3") as server:
        work = Path(scratch) / "work"
        canaries = {name: f"c4nary/{name}+{random.Random(name).randbytes(8).hex()}" for name in VARIABLES}
        canaries["AWS_SECRET_ACCESS_KEY"] = server.secret_key
        with PipelineApi(canaries["TUNE16_TOKEN"]) as pipelines, KubernetesApi(canaries["TUNE16_TOKEN"]) as cluster:
            _furnish(work, cluster, canaries)
            own = {"TUNE16_HOST": pipelines.url, "KUBECONFIG": str(cluster.kubeconfig(Path(scratch) / "kubeconfig"))}
            environment = {**os.environ, **server.environment(BUCKET), **canaries, **own, "HF_HUB_OFFLINE": "1"}
            commands = _commands(work, canaries)[: options.num or None]
            with s3.environment(server.environment(BUCKET)), ThreadPoolExecutor(2) as pool:
                s3.client().create_bucket(Bucket=BUCKET)
                wrong = [
                    found for found in pool.map(lambda command: _run(command, work, environment), commands) if found
                ]
                leaks, looked_at = _leaks(work, canaries | {"a wrong one": _WRONG}), sum(1 for _ in _texts(work))
    for problem in (*wrong, *leaks):
        print(problem, flush=True)
    figures = {
        "canaries": len(canaries),
        "commands": len(commands),
        "commands that did not end as they should": len(wrong),
        "files looked through": looked_at,
        "hits": len(leaks),
    }
    return report("canary", figures, not wrong and not leaks, options.output)


def _furnish(work: Path, cluster: KubernetesApi, canaries: dict[str, str]) -> None:
    """A model, rows, a recipe, and a namespace whose Secrets hold the canaries."""
    work.mkdir()
    work.with_name("token").write_text(canaries["HF_TOKEN"])
    write_model(work / "model")
    rows = work / "rows.jsonl"
    rows.write_text("".join(ORDERS.read_text().splitlines(keepends=True)[:160]))
    recipe = {
        "preflight": {"model": str(work / "model"), "data": str(rows)},
        "prepare": {"max_tokens": 128, "held_out_share": 0.1},
        "train": {"epochs": 3, "rank": 8, "learning_rate": 5e-3, "micro_batch": 4, "dropout": 0},
        "evaluate": {"num_prompts": 10, "max_new_tokens": 8},
        "convert": {"quantizations": ""},
        "upload": {"path": PATH},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    furnish(cluster)
    connection = dict.fromkeys(CONNECTION_VARIABLES, "x") | {"AWS_S3_ENDPOINT": "http://s3.svc"}
    connection["AWS_SECRET_ACCESS_KEY"] = canaries["AWS_SECRET_ACCESS_KEY"]
    cluster.add("v1", "secrets", secret("tune16-connection", connection))
    cluster.add("v1", "secrets", secret("tune16-tokens", {name: canaries[name] for name in TOKEN_VARIABLES}))


def _commands(work: Path, canaries: dict[str, str]) -> list[Command]:
    """What a person may do, well and badly; the quick ones first."""
    token, recipe, out = canaries["HF_TOKEN"], str(work / "recipe.yaml"), str(work / "out")
    inputs = ("--model", str(work / "model"), "--data", str(work / "rows.jsonl"))
    storage = Command("preflight", (*_STEPS, "preflight", *inputs, "--path", PATH))
    nowhere = str(work / "nowhere")
    folders = ("--weights", nowhere, "--rows", nowhere, "--output", out)
    return [
        Command("a bug in a step", ("-c", _BUG), code=1),
        Command("a bug in a command", ("-c", _BUG_OF_COMMAND, "run"), code=1),
        Command(
            "a secret as a setting", (*_STEPS, "prepare", *inputs, "--output", out, "--set", f"max_tokens={token}")
        ),
        Command("a secret as a name", (*_STEPS, "quantize", "--model", f"{nowhere}/{token}", "--output", out)),
        Command(
            "a secret in an address", (*_STEPS, "prepare", *_data(f"https://me:{token}@127.0.0.1:9/x"), *_out(out))
        ),
        Command(
            "a presigned address",
            (*_STEPS, "prepare", *_data(f"http://127.0.0.1:9/x?X-Amz-Signature={token}"), *_out(out)),
        ),
        Command("no training rows", (*_STEPS, "train", *folders)),
        Command("nothing to evaluate", (*_STEPS, "evaluate", *folders, "--adapter", nowhere)),
        Command("nothing to merge", (*_STEPS, "merge", "--model", nowhere, "--adapter", nowhere, "--output", out)),
        Command("nothing to convert", (*_STEPS, "convert", "--merged", nowhere, "--rows", nowhere, "--output", out)),
        Command("nothing to upload", (*_STEPS, "upload", *_nothing(nowhere), "--path", PATH)),
        Command("no version", (*_STEPS, "download", "--path", "team/none", "--output", out)),
        replace(storage, name="storage that is good", code=0),
        replace(storage, name="wrong secret", variables=(("AWS_SECRET_ACCESS_KEY", _WRONG),)),
        replace(storage, name="wrong endpoint", variables=(("AWS_S3_ENDPOINT", f"http://x:{_WRONG}@127.0.0.1:9"),)),
        replace(storage, name="wrong bucket", variables=(("AWS_S3_BUCKET", "none"),)),
        Command("a Hub that is away", (*_STEPS, "preflight", *_data("org/rows")), variables=_AWAY),
        Command(
            "a token in a file", (*_STEPS, "preflight", *_data("org/rows")), variables=(*_AWAY, *_token_file(work))
        ),
        Command("compile", (*_TUNE16, "compile", "--output", str(work / "pipeline.yaml")), code=0),
        Command("compile for upload", (*_TUNE16, "compile", "--ir", "--output", str(work / "ir.yaml")), code=0),
        Command("submit", (*_TUNE16, "submit", "llama2-7b-16gb"), code=0),
        Command("a token that is refused", (*_TUNE16, "submit"), variables=(("TUNE16_TOKEN", _WRONG),)),
        Command("doctor", (*_TUNE16, "doctor"), code=_ANY),
        Command("doctor by the kubeconfig", (*_TUNE16, "doctor"), code=_ANY, variables=(("TUNE16_TOKEN", ""),)),
        Command("the whole pipeline", (*_TUNE16, "run", recipe, "--folder", str(work / "runs")), code=0),
        Command("the whole pipeline, badly", (*_TUNE16, "run", recipe, *_badly(work)), code=2),
    ]


_AWAY = (("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", "http://127.0.0.1:9"))


def _token_file(work: Path) -> tuple[tuple[str, str], ...]:
    """The Hub's token out of its login's file, where no variable tells what to take out of texts."""
    return (("HF_TOKEN", ""), ("HF_TOKEN_PATH", str(work.with_name("token"))))


def _data(name: str) -> tuple[str, ...]:
    return ("--model", "org/name", "--data", name)


def _out(folder: str) -> tuple[str, ...]:
    return ("--output", folder)


def _nothing(folder: str) -> tuple[str, ...]:
    return ("--merged", folder, "--gguf", folder, "--evaluation", folder)


def _badly(work: Path) -> tuple[str, ...]:
    return ("--folder", str(work / "bad-runs"), "--set", f"preflight.data={work / 'model' / 'config.json'}")


def _run(command: Command, work: Path, environment: dict[str, str]) -> str:
    """Run one command, and keep what it says; what is wrong with its end, or nothing."""
    place = work / "said" / command.name.replace(" ", "-")
    place.mkdir(parents=True)
    ended = subprocess.run(
        [sys.executable, *command.arguments], capture_output=True, text=True, env=environment | dict(command.variables)
    )
    (place / "stdout").write_text(ended.stdout)
    (place / "stderr").write_text(ended.stderr)
    print(f"{command.name}: exit code {ended.returncode}", flush=True)
    if command.code in (_ANY, ended.returncode):
        return ""
    said = ended.stdout[-1500:] + ended.stderr[-1500:]
    return f"{command.name}: exit code {ended.returncode}, not {command.code}\n{said}"


def _leaks(work: Path, canaries: dict[str, str]) -> list[str]:
    """Where a canary is found, in whatever form."""
    forms = {
        form.encode(): f"{name} as {kind}"
        for name, value in canaries.items()
        for kind, form in (
            ("it is", value),
            ("URLs write it", quote(value, safe="")),
            ("base64", base64.b64encode(value.encode()).decode().rstrip("=")),
        )
    }
    return [f"{place}: {what}" for place, text in _texts(work) for form, what in forms.items() if form in text]


def _texts(work: Path) -> Iterator[tuple[str, bytes]]:
    """Everything that was left: files here, and objects in the bucket."""
    for file in sorted(work.rglob("*")):
        if file.is_file():
            yield str(file.relative_to(work)), file.read_bytes()
    for stored in s3.list_objects(BUCKET, ""):
        yield f"s3://{BUCKET}/{stored.key}", s3.read(BUCKET, stored.key) or b""


if __name__ == "__main__":
    raise SystemExit(main())
