"""What prepare works on: the data set's files, and the model's tokenizer with its chat template."""

from pathlib import Path
from typing import TYPE_CHECKING

from components.errors import Tune16Error
from components.prepare.chat import ChatTemplate, choose_template
from components.references import DATA_FILES, TOKENIZER_FILES, fetch, parse, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_files(data: str, split: str, scratch: Path) -> list[Path]:
    """Fetch the data set and find the files of one split, as the `datasets` library resolves it.

    Raises:
        Tune16Error: it has no data files or no such split.
    """
    path = fetch(parse(data, "data"), scratch, [*DATA_FILES, "README.md"])
    if path.is_file():
        return [path]
    if not any(file for pattern in DATA_FILES for file in path.rglob(pattern)):
        raise Tune16Error(f"{data}: has no data files. They end in .jsonl, .json, .csv or .parquet.")
    from datasets import load_dataset_builder  # slow to import, and a single file needs none of it

    splits = {str(name): found for name, found in load_dataset_builder(str(path)).config.data_files.items()}
    if split not in splits:
        raise Tune16Error(f"{data}: has no split '{split}'. Set prepare.split to one of: {', '.join(splits)}.")
    return [Path(file) for file in splits[split]]


def load_tokenizer(model: str, template: str, scratch: Path) -> "tuple[PreTrainedTokenizerBase, ChatTemplate]":
    """Load the model's tokenizer and choose its chat template.

    Raises:
        Tune16Error: the model has no fast tokenizer, or no template fits.
    """
    from transformers import AutoTokenizer

    reference = parse(model, "model")
    model_type = str(read_config(reference, scratch).get("model_type", ""))
    folder = fetch(reference, scratch, TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Tune16Error(f"{model}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise Tune16Error(
            f"{model}: has no tokenizer.json, which a fast tokenizer needs. Convert it once with `AutoTokenizer`."
        )
    return tokenizer, choose_template(template, tokenizer, model_type)
