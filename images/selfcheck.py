"""Run at the end of each image's build: checks that everything its steps need can be loaded and works."""

import importlib
import os
import subprocess
import sys

# What each image must be able to import: its steps' logic, and kfp's executor, which starts them.
_MODULES = {
    "tools": [
        "components.preflight.checks",
        "components.prepare.dataset",
        "components.upload.publisher",
        "components.register.registrar",
        "components.deploy.deployer",
        "model_registry",
        "pipelines.cli",
        "pipelines.cli_cluster",
        "pipelines.doctor",
        "pipelines.server",
    ],
    "trainer": [
        "components.quantize.checkpoint",
        "components.train.trainer",
        "components.train.distributed.node",
        "components.train.distributed.nodes",
        "components.evaluate.evaluation",
        "components.merge.merger",
    ],
    "gguf": [
        "components.convert.converter",
        "components.playground.serve.server",
        "components.playground.serve.api",
        "llama_cpp",
        "components.playground.serve.gguf",
        "sentencepiece",
    ],
    "chat": ["components.playground.chat.launch", "components.playground.chat.page"],
}
_T4 = "sm_75"


def check_image(image: str, accelerator: str) -> None:
    """Import an image's modules; in the trainer also quantise on the CPU and look for a T4's kernels."""
    os.environ["_KFP_RUNTIME"] = "true"  # as in a step's command: kfp's executor alone needs no dependencies
    for name in _MODULES[image] + ([] if image == "chat" else ["kfp.dsl.executor_main"]):
        importlib.import_module(name)
    if image == "gguf":
        _check_converter()
    if image == "trainer":
        _check_quantisation()
        if accelerator == "cuda":
            _check_architectures()
    print(f"selfcheck: {image} works")


def _check_converter() -> None:
    """Check that llama.cpp's converter is installed and can be started."""
    from components.convert.llamacpp import converter

    folder = converter()
    assert folder, "llama.cpp's converter is not installed"
    subprocess.run([sys.executable, folder / "convert_hf_to_gguf.py", "--help"], check=True, capture_output=True)


def _check_quantisation() -> None:
    import bitsandbytes.functional as bnb
    import torch

    weights = torch.linspace(-1, 1, 4096).reshape(64, 64)
    packed, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    error = (bnb.dequantize_4bit(packed, state) - weights).abs().max().item()
    assert error < 0.2, f"NF4 is off by {error}"


def _check_architectures() -> None:
    """The CUDA build has machine code for a T4. There is no GPU at build time, so the build's own flags are read."""
    import torch

    flags = torch._C._cuda_getArchFlags() or ""
    assert _T4 in flags.split(), f"this torch is built for {flags or 'no GPU'}, not for a T4 ({_T4})"


if __name__ == "__main__":
    check_image(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
