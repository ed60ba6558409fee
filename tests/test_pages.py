"""The commands that the pages tell people to type: each one is parsed as it stands there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from components.__main__ import app as steps
from pipelines.cli import app as tune16
from pipelines.cli_where import WithDefault

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "manifests/**/*.md", "images/*.md", "tests/faults/*.md", "components/engine/*.md")
    for path in ROOT.glob(pattern)
)
_COMMAND = re.compile(r"(?:\.venv/bin/)?(tune16|python3? -m components|make)(?: ([^`|#]*))?")


def _commands(page: Path) -> Iterator[tuple[str, str]]:
    """Program and arguments of every command on a page: in a block of code, or between backticks."""
    for line in page.read_text(encoding="utf-8").splitlines():
        places = [line] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        for part in (part.strip() for place in places for part in place.split("&&")):
            if (found := _COMMAND.fullmatch(part.partition(" #")[0].strip())) and found[2]:
                yield found[1].split()[-1], found[2].strip()


COMMANDS = sorted({command for page in PAGES for command in _commands(page)})


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 40 and {program for program, _ in COMMANDS} == {"tune16", "components", "make"}


@pytest.mark.parametrize(("program", "arguments"), COMMANDS, ids=lambda text: text[:60])
def test_a_command_of_a_page_is_there(program: str, arguments: str) -> None:
    words = shlex.split(re.sub(r"[\[\]…]", "", arguments))
    if program == "make":
        _check_make(words)
    else:
        _check_command(typer.main.get_command(tune16 if program == "tune16" else steps), words)


def _check_command(command: Any, words: list[str]) -> None:
    """See that the command has these subcommands and options, and takes so many arguments."""
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if isinstance(command, WithDefault) and words:
        command = next(iter(command.commands.values()))  # its first command is the default
    options = {option: found for found in command.params for option in (*found.opts, *found.secondary_opts)}
    num_arguments = sum(1 for found in command.params if found.param_type_name == "argument")
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            num_arguments -= 1
            assert num_arguments >= 0 or word == "STEP", f"{command.name} takes no {word}"
        elif word != "--help":
            assert word in options, f"{command.name} has no option {word}"
            if not options[word].is_flag:
                next(rest, None)


def _check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in words if "=" not in word]
    assert targets and all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets)
    for variable in (word.partition("=")[0] for word in words if "=" in word):
        assert re.search(rf"\b{variable}\b", makefile), f"the Makefile knows no {variable}"
