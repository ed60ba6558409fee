"""The step preflight: everything that can be known before a GPU is asked for."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import Recipe
from components.models.fetching import TOKENIZER_FILES, fetch, pin, read_config
from components.models.references import Reference, parse
from components.models.shapes import ModelShape, read_shape
from components.planning.disk import needed
from components.planning.memory import MemoryPlan, nearest, plan
from components.runtime.build import build
from components.runtime.errors import Tune16Error
from components.runtime.report import size
from components.runtime.steps import say
from components.storage import s3, versions
from components.storage.records import evaluation_key

_OF_A_VERSION = ("prepare", "quantize", "train", "evaluate", "merge", "convert")  # the steps that decide its content


@dataclass(frozen=True)
class Preflight:
    """What names and settings stand for now; what does not apply is empty.

    Fixed references of model, teacher and data set, the version to beat, the name of the evaluation that all of it
    leads to, the memory plan, and bytes of disk for each step.
    """

    model: str
    teacher: str
    data: str
    champion: str
    evaluation: str
    plan: MemoryPlan
    disk: dict[str, int]


def check(recipe: Recipe, path: str = "") -> Preflight:
    """Turn names into fixed references and find out what would fail later.

    Args:
        recipe: every setting.
        path: ``prefix/model-name`` in the connection's bucket that must be writable; empty checks no storage.

    Raises:
        Tune16Error: the storage cannot be written, model or data set cannot be read, the architecture is not
            supported, or training would not fit the GPU.
    """
    if recipe.deploy.runtime and (namespace := os.environ.get("KFP_NAMESPACE")):
        from components.kubernetes.api import check_service_name  # its client takes a second to import

        check_service_name(path, namespace)
    if path:
        s3.check_writable(s3.default_bucket(), path)
        say("preflight", f"s3://{s3.default_bucket()}/{path} is writable")
    model = pin(parse(recipe.preflight.model, "model"))
    say("preflight", f"model {model}")
    data = pin(parse(recipe.preflight.data, "data"))
    say("preflight", f"data set {data}")
    shape, teacher, teacher_shape = _shape(model), None, None
    if recipe.train.teacher:
        teacher = pin(parse(recipe.train.teacher, "model"))
        say("preflight", f"teacher {teacher}")
        teacher_shape = _shape(teacher)
        _check_same_vocabulary(model, teacher)
    disk = needed(shape, recipe, teacher_shape)
    largest = max(disk, key=lambda name: disk[name])
    say("preflight", f"disk: the step {largest} needs the most, {size(disk[largest])}")
    memory = plan(shape, recipe, teacher=teacher_shape)
    for line in memory.lines():
        say("preflight", line)
    refuse_unfit(memory, recipe, shape, teacher_shape)
    inputs = {"model": str(model), "teacher": str(teacher or ""), "data": str(data)}
    champion = _version_to_beat(path, inputs, recipe) if path else ""
    settings = _settings(recipe, "prepare", "quantize", "train", "evaluate")
    evaluation = evaluation_key(**inputs, path=path, champion=champion, code=build(), settings=settings)
    return Preflight(**inputs, champion=champion, evaluation=evaluation, plan=memory, disk=disk)


def _shape(model: Reference) -> ModelShape:
    with tempfile.TemporaryDirectory() as scratch:
        return read_shape(read_config(model, Path(scratch)), where=str(model))


def _check_same_vocabulary(student: Reference, teacher: Reference) -> None:
    """Check that teacher and student have the same tokens, over which the probabilities are.

    Raises:
        Tune16Error: the two tokenizers differ.
    """
    from transformers import AutoTokenizer

    vocabularies = []
    for model in (student, teacher):
        with tempfile.TemporaryDirectory() as scratch:
            folder = fetch(model, Path(scratch), TOKENIZER_FILES)
            vocabularies.append(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    if vocabularies[0] != vocabularies[1]:
        raise Tune16Error(
            f"train.teacher: {teacher} and {student} differ in vocabulary. Use a teacher of the same family."
        )


def _version_to_beat(path: str, inputs: dict[str, str], recipe: Recipe) -> str:
    """The champion; where this very run has made the champion, the version that the champion had to beat.

    So an unchanged run asks every later step for what it has done before, and the pipeline's cache answers.

    Raises:
        Tune16Error: the champion is made of another base model, and is not to be replaced.
    """
    champion = versions.read_champion(path)
    if champion is None:
        return ""
    manifest = versions.read_manifest(path, champion.version)
    base = manifest["lineage"]["model"]
    if base != inputs["model"] and not recipe.evaluate.replace_other_base:
        raise Tune16Error(f"upload.path: at {path}, {versions.other_base(champion.version, base)}")
    if not versions.is_made_of(path, manifest, {**inputs, "tune16": build()}, _settings(recipe, *_OF_A_VERSION)):
        return champion.version
    say("preflight", f"nothing has changed since {champion.version}: the steps come from the cache and need no GPU")
    beaten: str = manifest["lineage"]["champion"]
    return beaten


def _settings(recipe: Recipe, *steps: str) -> dict[str, Any]:
    """The settings of these steps, as a version's config.json has them."""
    content: dict[str, Any] = json.loads(recipe.model_dump_json(include=set(steps)))
    return content


def refuse_unfit(memory: MemoryPlan, recipe: Recipe, shape: ModelShape, teacher: ModelShape | None = None) -> None:
    """Refuse a plan that does not fit.

    Raises:
        Tune16Error: by how much it is over, and which single changes make it fit.
    """
    if memory.fits:
        return
    over = (memory.total - memory.available) / 2**30
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    reason = f"it needs {over:.1f} GiB more than gpu_memory_gib; the largest part is '{largest}'"
    if over <= 0:
        reason = f"its rows are so long that {memory.host / 2**30:.0f} GiB would have to be kept in the host's memory"
    changes = nearest(shape, recipe, teacher)
    remedy = f"Any one of these fits: {'; '.join(changes)}." if changes else "Use a smaller model or a larger GPU."
    raise Tune16Error(f"This run does not fit the GPU: {reason}. {remedy}")


def as_markdown(memory: MemoryPlan, disk: dict[str, int]) -> str:
    """The memory plan and the steps' disk space as Markdown tables for the dashboard."""
    result, *facts = (f"{fact[0].upper()}{fact[1:]}." for fact in (memory.result(), *memory.facts()))
    rows = [f"| {name} | {size(part)} |" for name, part in memory.parts.items()]
    rows.append(f"| **together**, of {size(memory.available)} | **{size(memory.total)}** |")
    steps = [f"| {name} | {size(num_bytes)} |" for name, num_bytes in disk.items()]
    lines = [f"**{result}**", *facts]
    tables = [["| GPU memory while training | |", "|---|---:|", *rows]]
    tables += [["| disk of the node that a step runs on | |", "|---|---:|", *steps]]
    return "\n\n".join([*lines, *("\n".join(table) for table in tables)]) + "\n"
