"""What prepare works on: the data set's files, and the model's tokenizer with its chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from components.models.fetching import TOKENIZER_FILES, fetch, read_config
from components.models.references import DATA_FILES, DATA_SUFFIXES, parse
from components.prepare.tokenize.chat import Template, choose_template
from components.prepare.tokenize.tokens import Limits
from components.runtime.errors import Tune16Error, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ABOUT = {"dataset_infos.json", "dataset_info.json", "metadata.json"}  # JSON that describes a data set
_SHOWN = 5  # names that a message lists


@dataclass(frozen=True)
class DataFiles:
    """The files of one split, in order, and a sentence on what lies beside them and is not read (empty: nothing)."""

    files: list[Path]
    note: str = ""


def find_files(data: str, configuration: str, split: str, scratch: Path) -> DataFiles:
    """Fetch the data set and find the files of one split, as the `datasets` library resolves it.

    Args:
        data: reference of the data set.
        configuration: which one, where its card (README.md) names several; empty where there is one.
        split: such as train.
        scratch: takes what is fetched.

    Raises:
        Tune16Error: it has no data files, no such configuration or split, a card that cannot be read, or files of
            several kinds, of which only one would be read.
    """
    path = fetch(parse(data, "data"), scratch, [*DATA_FILES, "README.md"])
    if path.is_file():
        return DataFiles([path])
    found = {file for pattern in DATA_FILES for file in path.rglob(pattern) if file.name not in _ABOUT}
    if any(path.glob("**/*.arrow")) and any(path.glob("**/state.json")):
        raise Tune16Error(f"{data}: was written by save_to_disk. Write it with to_parquet or to_json instead.")
    if not found:
        raise Tune16Error(f"{data}: has no data files. They end in .jsonl, .json, .csv or .parquet.")
    splits = _splits(data, path, configuration)
    if split not in splits:
        raise Tune16Error(f"{data}: has no split '{split}'. Set prepare.split to one of: {', '.join(splits)}.")
    read = {Path(file) for files in splits.values() for file in files}
    left_out = sorted(str(file.relative_to(path)) for file in found - read)
    if left_out and "configs" not in _card(data, path) and not _are_named(splits, path):
        kind = next(suffix for suffix in DATA_SUFFIXES if suffix in next(iter(read)).name)
        raise Tune16Error(
            f"{data}: has files of several kinds, and only {kind} would be read, not {_listed(left_out)}. Write all in "
            "one kind, or name one file as the data set."
        )
    others = sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.suffix in _OTHER_KINDS and file.is_file()
    )
    names = [*left_out, *others]
    return DataFiles([Path(file) for file in splits[split]], f"Not read: {_listed(names)}." if names else "")


def _are_named(splits: dict[str, list[str]], path: Path) -> bool:
    """Whether the files' names say which split they belong to; else all files of the commonest kind are its."""
    return len(splits) > 1 or any("train" in str(Path(file).relative_to(path)) for file in splits.get("train", []))


_OTHER_KINDS = {".tsv", ".txt", ".xlsx", ".xls", ".arrow", ".zip", ".tar", ".xml", ".yaml", ".yml", ".pkl"}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _splits(data: str, path: Path, configuration: str) -> dict[str, list[str]]:
    """The files of each split.

    Raises:
        Tune16Error: the `datasets` library cannot determine them.
    """
    from datasets import get_dataset_config_names, load_dataset_builder  # slow to import; a file needs none of it

    _card(data, path)
    try:
        known = get_dataset_config_names(str(path))
        if (configuration and configuration not in known) or (not configuration and len(known) > 1):
            said = f"has no configuration '{configuration}'" if configuration else "has several configurations"
            raise Tune16Error(f"{data}: {said}. Set prepare.configuration to one of: {', '.join(known)}.")
        builder = load_dataset_builder(str(path), configuration or None)
    except Tune16Error:
        raise
    except Exception as error:  # whatever the library raises on an unknown folder
        if "same data file format" in str(error):
            raise Tune16Error(
                f"{data}: its splits have files of different kinds. Write all in one kind, or name the file of one "
                "split as the data set (preflight.data)."
            ) from None
        raise Tune16Error(
            f"{data}: its splits are not clear ({str(error).partition(chr(10))[0]}). Name one file as the data set "
            "(preflight.data)."
        ) from None
    return {str(name): list(files) for name, files in builder.config.data_files.items()}


def _card(data: str, path: Path) -> dict[str, object]:
    """The header of the data set's card, which may name its configurations.

    Raises:
        Tune16Error: it is not valid YAML.
    """
    file = path / "README.md"
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    header = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    try:
        content = yaml.safe_load(header)
    except yaml.YAMLError as error:
        mark = (error.context_mark or error.problem_mark) if isinstance(error, yaml.MarkedYAMLError) else None
        line = mark.line + 1 if mark else 1
        raise Tune16Error(
            f"{data}: README.md, line {line}: its header is not valid YAML, so the files are unknown. Correct "
            "it, or name one file as the data set (preflight.data)."
        ) from None
    return content if isinstance(content, dict) else {}


def load_tokenizer(model: str, template: str, scratch: Path) -> "tuple[PreTrainedTokenizerBase, Template, Limits]":
    """Load the model's tokenizer, choose its chat template, and read what the model can take in.

    Its padding token is one that the model knows; any will do, since padding is masked by position.

    Raises:
        Tune16Error: the model has no fast tokenizer, or no template fits.
    """
    from transformers import AutoTokenizer

    reference = parse(model, "model")
    config = read_config(reference, scratch)
    folder = fetch(reference, scratch, TOKENIZER_FILES)
    _check_tokenizer_files(model, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise on an unknown folder
        raise Tune16Error(f"{model}: its tokenizer cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise Tune16Error(f"{model}: has no tokenizer.json. {_MAKE_TOKENIZER}")
    chosen = choose_template(template, tokenizer, str(config.get("model_type", "")), model)
    limits = Limits(*(_number(config, name) for name in ("vocab_size", "max_position_embeddings")))
    pad = tokenizer.pad_token_id
    if pad is None or 0 < limits.num_embeddings <= pad:
        tokenizer.pad_token = chosen.stop_token
    return tokenizer, chosen, limits


_MAKE_TOKENIZER = (
    "Make it once where sentencepiece is installed: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
)


def _check_tokenizer_files(model: str, folder: Path) -> None:
    """Refuse incomplete files, from which Transformers would make an empty tokenizer.

    Raises:
        Tune16Error: a file of the tokenizer is missing.
    """
    has_parts = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if (folder / "tokenizer.json").is_file() or has_parts:
        return
    if (folder / "tokenizer.model").is_file():
        raise Tune16Error(
            f"{model}: has its tokenizer as tokenizer.model only; tokenizer.json is needed. {_MAKE_TOKENIZER}"
        )
    raise Tune16Error(
        f"{model}: has no tokenizer: tokenizer.json is missing. Copy it, and tokenizer_config.json, from the model "
        "that this one was made from."
    )


def _number(config: dict[str, object], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0
