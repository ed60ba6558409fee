"""GPUs by name: the memory that tensors may fill, and the speeds that estimates are made with."""

from dataclasses import dataclass

from components.runtime.errors import Tune16Error

_SHARE_OF_PEAK = 0.6  # of the datasheet's rate that large matrix products reach; measured on an H200, assumed elsewhere
_SHARE_OF_BANDWIDTH = 0.65  # the same for passes over memory


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as on the command line.
        memory: GiB that tensors may fill: what the card reports, less about 0.5 GiB of the driver's.
        peak: matrix products in a 16-bit format, TFLOP/s, dense, by the datasheet.
        memory_speed: GB/s by the datasheet.
    """

    name: str
    memory: float
    peak: float
    memory_speed: float

    @property
    def flops(self) -> float:
        """Floating-point operations per second that large matrix products reach."""
        return self.peak * 1e12 * _SHARE_OF_PEAK

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a pass over memory reaches."""
        return self.memory_speed * 1e9 * _SHARE_OF_BANDWIDTH

    @classmethod
    def usual(cls) -> "Gpu":
        """The default: the one that recipes are made for."""
        return GPUS["t4"]


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 14.2, 65, 320),
        Gpu("v100-16", 15.2, 112, 900),
        Gpu("v100-32", 31.2, 112, 900),
        Gpu("rtx4060ti-16", 15.2, 88, 288),
        Gpu("rtx4080-16", 15.2, 195, 717),
        Gpu("a10", 21.8, 125, 600),
        Gpu("a10g", 21.8, 70, 600),
        Gpu("l4", 21.8, 121, 300),
        Gpu("l40s", 43.8, 362, 864),
        Gpu("a100-40", 38.9, 312, 1555),
        Gpu("a100-80", 78.7, 312, 2039),
        Gpu("h100", 78.6, 989, 3350),
        Gpu("h200", 139.3, 989, 4800),
    )
}


def known_gpu(device_name: str) -> Gpu | None:
    """The GPU that reports itself by this name ("Tesla T4", "NVIDIA A100-SXM4-80GB"), or None."""
    name = "".join(letter for letter in device_name.lower() if letter.isalnum())
    found = [gpu for key, gpu in GPUS.items() if all(part in name for part in key.split("-"))]
    return max(found, key=lambda gpu: len(gpu.name), default=None)


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        Tune16Error: there is none in the table.
    """
    if name.lower() not in GPUS:
        raise Tune16Error(f"Unknown GPU '{name}'. Known: {', '.join(GPUS)}.")
    return GPUS[name.lower()]
