"""Writes docs/reference/cli.md, the command line's reference, from the commands themselves.

    python docs/reference/command_line.py

A test holds the page against it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from tune_hypergrad.cli import app
from tune_hypergrad.wording import markdown_table

PAGE = Path(__file__).parent / "cli.md"
HEAD = """# The command line

`--help` after each of these says the same. What a person got wrong ends in one line and exit status 2; Ctrl-C ends with
130, and what was done is kept.

(`python docs/reference/command_line.py` writes this page.)
"""


def page() -> str:
    """The page's text."""
    return "\n".join([HEAD, *(section(command.callback) for command in app.registered_commands if command.callback)])


def section(command: Callable[..., Any]) -> str:
    """A command's usage, what it does, and its arguments and options."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    arguments, options = [], []
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind, *told = get_args(hint) or (hint,)
        if told and isinstance(told[0], ArgumentInfo):
            needed = defaults[name] is inspect.Parameter.empty
            arguments.append((name.upper() if needed else f"[{name.upper()}]", told[0].help))
        elif told and isinstance(told[0], OptionInfo):
            options.append((_usage(name, kind), *_help_and_default(told[0].help, defaults[name])))
    usage = " ".join([f"tune-hypergrad {command.__name__}", *(argument for argument, _ in arguments)])
    usage += " [OPTION ...]" if options else ""
    lines = [f"## tune-hypergrad {command.__name__}", "", f"`{usage}`", "", inspect.getdoc(command) or ""]
    if arguments:
        lines += ["", markdown_table(("argument", ""), ((f"`{name}`", text or "") for name, text in arguments))]
    if options:
        lines += ["", markdown_table(("option", "", "default"), options)]
    return "\n".join([*lines, ""])


def _usage(name: str, kind: Any) -> str:
    option = name.replace("_", "-")
    kinds = [member for part in (get_args(kind) or (kind,)) for member in (get_args(part) or (part,))]
    if bool in kinds:
        return f"`--{option}`, `--no-{option}`"
    (taken,) = (member for member in kinds if member is not type(None))
    if issubclass(taken, Enum):
        return f"`--{option}` {', '.join(member.value for member in taken)}"
    return f"`--{option}` {'PATH' if issubclass(taken, Path) else {int: 'N', float: 'X'}.get(taken, 'TEXT')}"


def _help_and_default(text: str | None, default: Any) -> tuple[str, str]:
    text, _, told = (text or "").partition(" [default: ")
    if told or default is None:
        return text, told.removesuffix("]")
    return text, f"{'yes' if default else 'no'}" if isinstance(default, bool) else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
