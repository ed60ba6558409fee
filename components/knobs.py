"""The page of all settings, made from the models in ``config.py``."""

from typing import Any, Literal, get_args, get_origin

from components.config import CONFIG_OF_STEP, StepConfig

_HEAD = """# Every setting

Made from `config.py` by `python -m components knobs`; `make compile` writes it and a test checks it. A recipe sets a
field under its step's name, `tune16 run demo --set train.epochs=3` on the command line. The dashboard's form shows
some of them as `<step>_<field>` and takes the others of a step as JSON in `<step>_options`.
"""


def knobs_page() -> str:
    """All steps' settings as Markdown tables."""
    return "\n".join([_HEAD, *(_table(step, cls) for step, cls in CONFIG_OF_STEP.items())])


def _table(step: str, cls: type[StepConfig]) -> str:
    rows = [_row(name, field) for name, field in cls.model_fields.items()]
    head = f"## {step}\n\n{cls.__doc__}\n\n| setting | default | values | unit | what it is |\n|---|---|---|---|---|"
    return "\n".join([head, *rows, ""])


def _row(name: str, field: Any) -> str:
    extra = field.json_schema_extra or {}
    default = "(empty)" if field.default == "" else field.default
    return f"| `{name}` | {default} | {_values(field)} | {extra.get('unit', '')} | {field.description} |"


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
