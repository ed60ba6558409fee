"""prepare on 52,000 Alpaca-like rows and on ten times as many, beside a single-process `datasets.map` that renders and
tokenises the same rows, row by row as TRL does and in batches, each in a process of its own.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

from measure import run, write

from pipelines.demo.base import _train_tokenizer
from pipelines.demo.generate import CORPUS

ROWS = 52_000

# Each command is its imports and its work on sys.argv: rows, model, target, how to map.
PREPARE = (
    "from components.config import PrepareConfig; from components.prepare.dataset import prepare_dataset\n"
    "from transformers import AutoTokenizer",
    'prepare_dataset(sys.argv[1], sys.argv[2], Path(sys.argv[3]), PrepareConfig(template="llama2"))',
)
CHECK = (
    "from components.config import PrepareConfig; from components.prepare.dataset import check_rows",
    'check_rows([Path(sys.argv[1])], PrepareConfig(), "data")',
)
MAP = (
    "from importlib.resources import files; from datasets import load_dataset; from transformers import AutoTokenizer",
    """
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
tokenizer.chat_template = (files("components.prepare") / "templates" / "llama2.jinja").read_text().strip()
def messages(row):
    question = row["instruction"] + ("\\n\\n" + row["input"] if row["input"] else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
def one(row):
    done = tokenizer.apply_chat_template(messages(row), return_dict=True, return_assistant_tokens_mask=True)
    return {"input_ids": done["input_ids"], "mask": done["assistant_masks"]}
def many(rows):
    batch = [messages(dict(zip(rows, values))) for values in zip(*rows.values())]
    done = tokenizer.apply_chat_template(batch, return_dict=True, return_assistant_tokens_mask=True)
    return {"input_ids": done["input_ids"], "mask": done["assistant_masks"]}
data = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
data.map(many if sys.argv[4] == "batched" else one, batched=sys.argv[4] == "batched").save_to_disk(sys.argv[3] + "/out")
""",
)


def write_rows(path: Path, num_rows: int) -> None:
    """Alpaca-like rows: an instruction, every third with an input, an answer of 10 to 120 words."""
    draw = random.Random(0)
    words = sorted({word.strip(".,?;:") for word in CORPUS.read_text().split()})
    with path.open("w") as file:
        for number in range(num_rows):
            row = {
                "instruction": f"Task {number}: " + " ".join(draw.choices(words, k=draw.randint(6, 20))),
                "input": " ".join(draw.choices(words, k=20)) if number % 3 == 0 else "",
                "output": " ".join(draw.choices(words, k=draw.randint(10, 120))),
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    figures: dict[str, object] = {"rows": ROWS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        _train_tokenizer(CORPUS.read_text()).save_pretrained(model)
        (model / "config.json").write_text('{"model_type": "llama"}')
        (model / "model.safetensors").write_bytes(b"")
        for name, num_rows in (("rows", ROWS), ("ten times", 10 * ROWS)):
            write_rows(folder / f"{name}.jsonl", num_rows)
        for name, (imports, work), rows, extra in (
            ("check", CHECK, "rows", ""),
            ("prepare", PREPARE, "rows", ""),
            ("map, row by row", MAP, "rows", "single"),
            ("map, batched", MAP, "rows", "batched"),
            ("prepare, ten times the rows", PREPARE, "ten times", ""),
        ):
            target = folder / f"out {name}"
            figures[name] = run(imports, work, folder / f"{rows}.jsonl", model, target, extra)
            print(name, figures[name], file=sys.stderr, flush=True)
    write("prepare", figures)
