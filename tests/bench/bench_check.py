"""The check of a data set: rows per second for reading and the rules of the form alone and for everything, on rows of
about 500 bytes, and the memory that 5 GB of rows of about 2 KB take. Each in a process of its own.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from measure import run, write

from pipelines.demo.generate import CORPUS

ROWS = 200_000
LARGE = 5_000_000_000  # bytes

STRUCTURAL = (
    "from components.prepare.input.conversations import conversations\n"
    "from components.prepare.rules.findings import Findings",
    'for _ in conversations([Path(sys.argv[1])], "prompt_completion", Findings()): pass',
)
EVERYTHING = (
    "from components.config import PrepareConfig; from components.prepare.rules.check import check_rows",
    'check_rows([Path(sys.argv[1])], PrepareConfig(), "data").findings.refuse("data")',
)


def write_rows(path: Path, row_bytes: int, num_bytes: int) -> int:
    """Rows of sentences drawn from 20,000; returns their number."""
    draw = random.Random(0)
    words = sorted({word.strip(".,?;:") for word in CORPUS.read_text().split()})
    sentences = [" ".join(draw.choices(words, k=14)).capitalize() + "." for _ in range(20_000)]
    length = sum(map(len, sentences)) / len(sentences) + 1
    per_row = round((row_bytes - 40) / length)
    written = num_rows = 0
    with path.open("w") as file:
        while written < num_bytes:
            drawn = draw.choices(sentences, k=per_row)
            row = {"prompt": f"{num_rows}: {drawn[0]}", "completion": " ".join(drawn[1:])}
            written += file.write(json.dumps(row) + "\n")
            num_rows += 1
    return num_rows


if __name__ == "__main__":
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, row_bytes, num_bytes in (("rows", 500, ROWS * 500), ("large", 2000, LARGE)):
            path = Path(scratch) / f"{name}.jsonl"
            if shutil.disk_usage(scratch).free < 2 * num_bytes:
                sys.exit(f"{scratch}: needs {2 * num_bytes / 1e9:.0f} GB of free disk.")
            num_rows = write_rows(path, row_bytes, num_bytes)
            figures[name] = {"rows": num_rows, "bytes": path.stat().st_size}
            for kind, (imports, work) in (("structural", STRUCTURAL), ("everything", EVERYTHING)):
                measured = run(imports, work, path)
                measured["rows_per_s"] = round(num_rows / measured["work_s"])
                figures[f"{kind}, {name}"] = measured
                print(kind, name, measured, file=sys.stderr, flush=True)
    write("check", figures)
