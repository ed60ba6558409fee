"""Which step runs in which container image.

Tags are versions and never move: the pipeline cache tells two runs apart by the image's name, not by its content.
TUNE16_REGISTRY names another registry for a pipeline that is compiled or submitted from here; overlays have the feature
`images` for that.
"""

import os

REGISTRY = os.environ.get("TUNE16_REGISTRY", "image-registry.openshift-image-registry.svc:5000/tune16")
VERSION = "0.1.0"

TOOLS = f"{REGISTRY}/tools:{VERSION}"
TRAINER = f"{REGISTRY}/trainer:{VERSION}"
GGUF = f"{REGISTRY}/gguf:{VERSION}"

IMAGE_OF_STEP = {
    "preflight": TOOLS,
    "prepare": TOOLS,
    "quantize": TRAINER,
    "train": TRAINER,
    "evaluate": TRAINER,
    "merge": TRAINER,
    "convert": GGUF,
    "upload": TOOLS,
    "register": TOOLS,
    "deploy": TOOLS,
}
