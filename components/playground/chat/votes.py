"""Thumbs of the chat page as a data set: one JSON Lines file for each answer that got one.

    <place>/up/<id>.jsonl      {"messages": […]}: what people liked, ready to be trained on as it is
    <place>/down/<id>.jsonl    what they did not like, to be reviewed

The id is that of the conversation and its answer, so a changed vote moves its file, and a withdrawn one removes it.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from components.playground.client import Messages
from components.storage import s3

Vote = Literal["up", "down", ""]


def record_vote(place: str, messages: Messages, model: str, vote: Vote) -> None:
    """Write down a vote on the last message of `messages`; the empty vote withdraws an earlier one.

    Args:
        place: ``s3://bucket/folder`` (``s3:///folder`` is the connection's own bucket), or a folder on this disk.
        messages: the conversation with the answer at its end.
        model: who answered.
        vote: what it got.

    Raises:
        Tune16Error: the storage cannot be written.
        OSError: the disk cannot be written.
    """
    name = hashlib.sha256(json.dumps([model, messages]).encode()).hexdigest()[:32]
    for folder in ("up", "down"):
        if folder == vote:
            line = json.dumps({"messages": messages, "model": model}, ensure_ascii=False) + "\n"
            _write(f"{place}/{folder}/{name}.jsonl", line.encode())
        else:
            _remove(f"{place}/{folder}/{name}.jsonl")


def _write(place: str, content: bytes) -> None:
    if place.startswith("s3://"):
        s3.write(*_bucket_and_key(place), content)
    else:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(content)


def _remove(place: str) -> None:
    if place.startswith("s3://"):
        s3.delete(*_bucket_and_key(place))
    else:
        Path(place).unlink(missing_ok=True)


def _bucket_and_key(place: str) -> tuple[str, str]:
    bucket, _, key = place.removeprefix("s3://").partition("/")
    return bucket or s3.default_bucket(), key
