"""Charts: the memory plan as a bar."""

from pathlib import Path

from matplotlib.figure import Figure

from components.planning.memory import GIBIBYTE, MemoryPlan
from components.runtime.errors import Tune16Error


def draw_plan(planned: MemoryPlan, title: str, path: Path) -> None:
    """Draw the plan as one bar of its parts against the GPU's memory.

    Raises:
        Tune16Error: the file's extension is not an image format, or the file cannot be written.
    """
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for index, (name, size) in enumerate(planned.parts.items()):
        width = size / GIBIBYTE
        axes.barh(0, width, left=left, color=f"C{index}", label=f"{name} {width:.2f}")
        left += width
    limit = planned.available / GIBIBYTE
    axes.axvline(limit, color="black", linestyle="--", label=f"the GPU's {limit:.2f}")
    axes.set(xlim=(0, max(limit, left) * 1.02), ylim=(-0.5, 0.5), yticks=[], xlabel="GiB", title=title)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise Tune16Error(f"{path}: the picture cannot be written: {error}") from None
