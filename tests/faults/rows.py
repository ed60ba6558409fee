"""Well-formed data sets in every form and kind of file, for the scripts that break them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipelines.demo.generate import CORPUS

Row = dict[str, Any]

WORDS = sorted({word.strip(".,?;:") for word in CORPUS.read_text().split()})
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
# Form, format, compression.
WELL_FORMED = [
    *(("prompt_completion", suffix, "") for suffix in (".jsonl", ".ndjson", ".json", ".csv", ".parquet")),
    *(("prompt_completion", ".jsonl", packed) for packed in (".gz", ".bz2", ".xz", ".zst")),
    *(
        ("alpaca", suffix, packed)
        for suffix, packed in ((".jsonl", ""), (".json", ".gz"), (".csv", ""), (".parquet", ""))
    ),
    *(("messages", suffix, "") for suffix in (".jsonl", ".json", ".parquet")),
    *(("sharegpt", suffix, packed) for suffix, packed in ((".jsonl", ".zst"), (".json", ""))),
    ("llama2_text", ".csv", ".xz"),
    ("oasst", ".jsonl", ""),
]


def text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def make_rows(rng: random.Random, num: int, form: str = "prompt_completion") -> list[Row]:
    """Rows that have nothing in common."""
    return [row for number in range(num) for row in _MAKERS[form](text(rng, 20), text(rng, 60), number)]


def write_rows(path: Path, rows: list[Row]) -> Callable[[int], int]:
    """Write rows in the kind of file that the name says; returns the line (Parquet: the row) of a row's number."""
    name, _, packed = path.name.rpartition(".")
    suffix, compression = (Path(name).suffix, f".{packed}") if f".{packed}" in PACK else (path.suffix, "")
    content, first = _content(suffix, rows)
    path.write_bytes(PACK[compression](content))
    return lambda number: number + first


def _content(suffix: str, rows: list[Row]) -> tuple[bytes, int]:
    if suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue(), 1
    if suffix == ".csv":
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return table.getvalue().encode(), 2
    lines = [json.dumps(row) for row in rows]
    if suffix == ".json":
        return ("[\n" + ",\n".join(lines) + "\n]\n").encode(), 2
    return "".join(f"{line}\n" for line in lines).encode(), 1


def _oasst(question: str, answer: str, number: int) -> list[Row]:
    def message(name: str, parent: str | None, role: str, content: str) -> Row:
        keys = {"message_tree_id": f"{number}q", "message_id": f"{number}{name}", "parent_id": parent}
        return {**keys, "role": role, "text": content, "rank": None}

    return [message("q", None, "prompter", question), message("a", f"{number}q", "assistant", answer)]


_MAKERS: dict[str, Callable[[str, str, int], list[Row]]] = {
    "prompt_completion": lambda question, answer, _: [{"prompt": question, "completion": answer}],
    "alpaca": lambda question, answer, _: [{"instruction": question, "input": "", "output": answer}],
    "messages": lambda question, answer, _: [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    ],
    "sharegpt": lambda question, answer, _: [
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    ],
    "llama2_text": lambda question, answer, _: [{"text": f"<s>[INST] {question} [/INST] {answer} </s>"}],
    "oasst": _oasst,
}
