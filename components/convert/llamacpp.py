"""llama.cpp: its converter as processes of their own, and its quantiser.

The package llama-cpp-python has the library; ``images/llama.py`` puts the converter of the same source archive into its
folder. The converter works with torch and memory maps; in processes of their own both are gone when it is done.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from components.runtime.cpus import num_threads
from components.runtime.errors import Tune16Error

# Rows that the quantiser holds at once. Its own 8 GiB hold an embedding of 152,064 x 3,584 twice, in float32.
_QUANTIZER_BYTES = 512 << 20
_SHOWN_LINES = 3


def converter() -> Path | None:
    """The folder with llama.cpp's converter; None where llama.cpp is not installed."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent / "converter"
    return folder if folder.is_dir() else None


def convert_weights(folder: Path, model: Path, target: Path, name: str) -> None:
    """Write the Hugging Face folder `model` as the 16-bit GGUF file `target`; `name` is the model's name in it.

    Raises:
        Tune16Error: llama.cpp does not know the model's architecture or its tokenizer.
    """
    _run(folder / "convert_hf_to_gguf.py", model, "--model-name", name, "--outtype", "f16", "--outfile", target)


def convert_adapter(folder: Path, adapter: Path, model: Path, target: Path) -> None:
    """Write PEFT's `adapter` as a GGUF LoRA file; `model` is a folder with its base model's configuration.

    Raises:
        Tune16Error: llama.cpp does not know what it adapts.
    """
    _run(folder / "convert_lora_to_gguf.py", adapter, "--base", model, "--outtype", "f16", "--outfile", target)


def _run(script: Path, source: Path, *arguments: str | Path) -> None:
    """Run one of the converter's scripts; its output is shown only when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(num_threads())}
    command = [sys.executable, script, source, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "is not supported" in line), "\n  ".join(lines[-_SHOWN_LINES:]))
        raise Tune16Error(
            f"llama.cpp cannot convert this model: {reason.removeprefix('ERROR:hf-to-gguf:')}\n  Leave "
            "gguf_quantizations empty to publish the model without GGUF files."
        )


def quantize(source: Path, target: Path, quantization: str) -> None:
    """Quantise the 16-bit GGUF file `source`; `quantization` is llama.cpp's name, such as ``Q4_K_M``."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    parameters.nthread = num_threads()
    parameters.max_buf_size = _QUANTIZER_BYTES
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
    if code:
        raise Tune16Error(f"{target.name}: llama.cpp could not quantise {source} (code {code}). Is the disk full?")
