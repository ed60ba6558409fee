"""The page of all settings, made from the models in ``config.py``."""

from typing import Any, Literal, get_args, get_origin

from components.config import CONFIG_OF_STEP, StepConfig, form_field

_HEAD = """# Every setting

Made from `config.py` by `python -m components knobs`; `make compile` writes it and a test checks it. A recipe sets a
field under its step's name, `tune16 run demo --set train.epochs=3` on the command line. The dashboard's form has
fields of its own for some, and takes the others of three steps as JSON, as the column "in the form" says.
"""


def knobs_page() -> str:
    """All steps' settings as Markdown tables."""
    return "\n".join([_HEAD, *(_table(step, cls) for step, cls in CONFIG_OF_STEP.items())])


def _table(step: str, cls: type[StepConfig]) -> str:
    rows = [_row(step, name, field) for name, field in cls.model_fields.items()]
    columns = "| setting | default | values | unit | what it is | in the form |\n|---|---|---|---|---|---|"
    head = f"## {step}\n\n{cls.__doc__}\n\n{columns}"
    return "\n".join([head, *rows, ""])


def _row(step: str, name: str, field: Any) -> str:
    extra = field.json_schema_extra or {}
    default = "(empty)" if field.default == "" else field.default
    cells = (f"`{name}`", default, _values(field), extra.get("unit", ""), field.description)
    return f"| {' | '.join(map(str, cells))} | {form_field(f'{step}.{name}')} |"


def _values(field: Any) -> str:
    """What a field takes: its choices, or its type and limits."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(str(choice) for choice in get_args(field.annotation))
    limits: dict[str, float] = {}
    for constraint in field.metadata:
        limits |= {sign: getattr(constraint, sign) for sign in ("gt", "ge", "lt", "le") if hasattr(constraint, sign)}
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    kind = names.get(getattr(field.annotation, "__name__", ""), "JSON")
    return " ".join([kind, ", ".join(f"{signs[sign]} {value:g}" for sign, value in limits.items())]).strip()
