"""What `serve` and `chat` find when they are given a folder: a GGUF file, or weights with their tokenizer."""

import struct
from dataclasses import dataclass
from pathlib import Path

from components.runtime.errors import Tune16Error

_ADAPTER = "adapter.gguf"
_ALPHA = b"adapter.lora.alpha" + struct.pack("<I", 6)  # a key of GGUF's and the type of its value, float32


@dataclass(frozen=True)
class Target:
    """A model on this disk: its GGUF file or the folder with its weights, and the GGUF LoRA file beside it, if any."""

    model: Path
    adapter: Path | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether llama.cpp runs it."""
        return self.model.is_file()


def find_target(place: Path) -> Target:
    """The model at `place`.

    Args:
        place: a GGUF file, a folder with GGUF files or weights, a downloaded version, a run of `tune16 run`, or a
            folder of runs, whose newest is taken.

    Raises:
        Tune16Error: there is none.
    """
    if place.is_file():
        _check_is_model(place)
        return _with_adapter(place)
    for folder in (place, *sorted(place.glob("*/"), key=lambda folder: folder.stat().st_mtime, reverse=True)):
        for pattern in ("model-*.gguf", "*.gguf", "gguf/model-*.gguf", "steps/*/convert/gguf/model-*.gguf"):
            files = [file for file in sorted(folder.glob(pattern)) if file.name != _ADAPTER]
            if files:
                return _with_adapter(max(files, key=lambda file: file.stat().st_size))
        for pattern in ("config.json", "merged/config.json", "steps/*/merge/merged/merged/config.json"):
            for config in sorted(folder.glob(pattern)):
                if any(config.parent.glob("*.safetensors")):
                    return Target(config.parent)
    if place.is_dir() and any(place.rglob("adapter_model.safetensors")):
        raise Tune16Error(f"{place}: has an adapter only. Name the folder with the merged model, or a GGUF file.")
    raise Tune16Error(f"{place}: no model found, neither a GGUF file nor weights. Run `make run` first, or name one.")


def _check_is_model(file: Path) -> None:
    """Refuse files that are not GGUF, and adapters.

    Raises:
        Tune16Error: says what it is.
    """
    with file.open("rb") as stream:
        start = stream.read(1 << 16)
    if not start.startswith(b"GGUF"):
        raise Tune16Error(f"{file}: is not a GGUF file. Name one, or the folder of a model.")
    if _ALPHA in start:
        raise Tune16Error(f"{file}: is an adapter, not a model. Name the model's file beside it.")


def _with_adapter(file: Path) -> Target:
    adapter = file.with_name(_ADAPTER)
    return Target(file, adapter if adapter.is_file() else None)


def write_inverse(adapter: Path, target: Path) -> None:
    """Write a GGUF LoRA file that takes away what `adapter` adds: on the tuned model it gives the base model.

    LoRA adds alpha / rank times B A; this one has minus alpha.
    """
    content = bytearray(adapter.read_bytes())
    place = content.find(_ALPHA) + len(_ALPHA)
    assert place >= len(_ALPHA), f"{adapter} has no alpha"
    (alpha,) = struct.unpack_from("<f", content, place)
    struct.pack_into("<f", content, place, -alpha)
    target.write_bytes(content)
