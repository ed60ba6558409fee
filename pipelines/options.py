"""Shared by the commands of `tune16`: common options, recipes by name, and the sizes of a recipe's model."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from components.config import Recipe, load_recipe
from components.models.shapes import ModelShape, known_shape, read_shape
from components.runtime.errors import Tune16Error

_RECIPES = Path(__file__).parent / "recipes"

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a recipe that ships with Tune16, or a path.")
]
Settings = Annotated[list[str], typer.Option("--set", help="A setting as step.field=value; can be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def find_recipe(name: str) -> Recipe:
    """Load a recipe by the name it ships under, or from a path.

    Raises:
        Tune16Error: there is none, or a setting in it is wrong.
    """
    shipped = _RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return load_recipe(shipped)
    if Path(name).is_file():
        return load_recipe(Path(name))
    names = ", ".join(sorted(path.stem for path in _RECIPES.glob("*.yaml")))
    raise Tune16Error(f"There is no recipe '{name}', neither shipped with Tune16 nor as a file. Shipped: {names}.")


def find_shapes(settings: Recipe) -> tuple[ModelShape, ModelShape | None]:
    """The sizes of a recipe's model, and of its teacher if it has one.

    Raises:
        Tune16Error: as :func:`find_shape`.
    """
    teacher = settings.train.teacher
    return find_shape(settings.preflight.model), find_shape(teacher) if teacher else None


def find_shape(model: str) -> ModelShape:
    """The sizes of a model: known ones, or from its config.json, which may be all that there is of it.

    Raises:
        Tune16Error: the model cannot be read from here, or its architecture is not supported.
    """
    shape = known_shape(model)
    if shape is None:
        from components.models.fetching import read_config, read_document
        from components.models.references import parse

        document = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
        if document.is_file():
            return read_shape(read_document(document), where=model)
        with tempfile.TemporaryDirectory() as scratch:
            reference = parse(model, "model")
            shape = read_shape(read_config(reference, Path(scratch)), where=model)
    return shape
