"""What the README and the pages in docs/ show works: their Python runs, in small sizes, and their commands exist.

Blocks of a page run one after another, in one namespace and one folder. In a page's source,

- `<!-- not run: REASON -->` before a block leaves it out: its Python is compiled still, and its commands are looked up;
- `<!-- setup`, lines of Python, `-->` is run where it stands, and not shown;
- a block with a title is written to a file of that name first.

Commands of pip, Slurm and Ray's cluster launcher are never run; `.ci/run` installs the package as the README says.
"""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from markdown_it import MarkdownIt
from paths import REPOSITORY

import tune_hypergrad
from tune_hypergrad import cli

DOCS = REPOSITORY / "docs"
PAGES = {str(path.relative_to(REPOSITORY)): path for path in (REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md")))}
PAGES |= {name: REPOSITORY / name for name in ("CONTRIBUTING.md", "examples/cluster/README.md")}

SMALLER = {
    "README.md": [('budget="600e", seeds=3', 'budget="12e", epochs=1, progress="quiet"')],
    "docs/black_box.md": [("num_samples=200", "num_samples=6"), ("max_budget=27", "max_budget=3")],
    "docs/concepts/sharing.md": [("steps=250", "steps=50"), ("(250,)", "(50,)"), ("equal(250, 50)", "equal(50, 10)")],
    "docs/groups.md": [
        ("Problem(..., ", "problem = Problem(Net, train, val, loss=F.cross_entropy, "),
        (
            "steps=500, fixed={...}",
            "steps=20, fixed={f'lr/backbone/cosine/{name}': 0.1 for name in ('warm_up', 'floor')}",
        ),
    ],
    "docs/howto/compare.md": [('budget="600e", seeds=3', 'budget="12e", epochs=1, progress="quiet"')],
    "docs/howto/problem.md": [("steps=500", "steps=20"), ("steps=100", "steps=20")],
    "docs/howto/ray.md": [
        ("steps=500, trainings=40", "steps=17, trainings=8"),
        ("steps=500", "steps=17"),
        ("outer_steps=20", "outer_steps=1"),
        ("num_samples=30", "num_samples=2"),
        ("steps=100", "steps=10"),
    ],
    "docs/recipe.md": [('budget="600e"', 'budget="12e", epochs=1, progress="quiet"'), ("steps=500", "steps=20")],
    "docs/self_tuning/README.md": [("steps=20_000", "steps=60")],
    "docs/tutorial.md": [("--epochs 2 --budget 60e", "--epochs 1 --budget 12e --retrain-seeds 1 --progress quiet")],
}
"""What is written otherwise where it runs here, so that it takes seconds."""

BEFORE = {
    "docs/groups.md": """
import torch
import torch.nn.functional as F
from ray import tune
from torch import nn
from tune_hypergrad import Problem, Schedule, complement, hypergradient, problems, schedule
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.Tanh()), nn.Linear(8, 10)
        self.norm = nn.LayerNorm(8)
    def forward(self, x):
        return self.head(self.norm(self.encoder(x.flatten(1))))
train, val = problems.get("digits_mlp").train.tensors, problems.get("digits_mlp").val.tensors
lr, peak, step, model = torch.full((7,), 0.1), torch.tensor([0.05]), 3, Net()
Schedule({"lr": 0.1, "lr/backbone": (0.01, 0.001)}).save("schedule.json")
"""
}
"""Python that is run before a page whose source has none."""

WITH_RAY = (
    "README.md",
    "docs/black_box.md",
    "docs/howto/compare.md",
    "docs/howto/ray.md",
    "docs/recipe.md",
    "docs/self_tuning/README.md",
    "docs/tutorial.md",
)
INSIDE = "docs/architecture.md"
"""For those who change the package: it imports what is nobody else's."""
NEEDS = {"docs/howto/libraries.md": ("transformers", "accelerate", "lightning")}


@dataclass(frozen=True)
class Block:
    """A block of code, or a hidden one of Python."""

    page: str
    line: int
    language: str
    code: str
    title: str | None = None
    reason: str | None = None
    """Why it is not run."""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of a shell block's commands."""
        lines = re.sub(r"\\\n\s*", "", self.code).splitlines()
        return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    reason = None
    for token in MarkdownIt().parse(PAGES[page].read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block" and token.content.startswith("<!-- not run: "):
            reason = token.content.strip().removeprefix("<!-- not run: ").removesuffix("-->").strip()
            continue
        if token.type == "html_block" and token.content.startswith("<!-- setup\n"):
            code = token.content.strip().removeprefix("<!-- setup\n").removesuffix("-->")
            yield Block(page, line, "setup", code)
            continue
        if token.type in ("fence", "code_block"):
            language, _, rest = token.info.partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            yield Block(page, line, language, token.content, title and title.group(1), reason)
        reason = None


def inline_commands(page: str) -> Iterator[str]:
    """Commands of this package's within lines of text."""
    for token in MarkdownIt("commonmark").enable("table").parse(PAGES[page].read_text(encoding="utf-8")):
        for child in token.children or ():
            text = " ".join(child.content.split())
            if child.type == "code_inline" and re.match(r"(tune-hypergrad |python (benchmarks|examples|docs)/)", text):
                yield text


def smaller(page: str, code: str) -> str:
    for old, new in SMALLER.get(page, ()):
        code = code.replace(old, new)
    return code


def looked_up(words: list[str]) -> None:
    """Hold a command against what it is of; nothing is run."""
    program, *rest = words
    if "=" in program:  # a variable of the environment
        return looked_up(rest)
    if program == "tune-hypergrad":
        group = typer.main.get_command(cli.app)
        name, *arguments = [word for word in rest if word != "..."]
        if name not in group.commands:
            raise AssertionError(f"there is no command {name!r}")
        if "--help" not in arguments:
            group.commands[name].make_context(name, arguments)
    elif program == "python":
        script = REPOSITORY / rest[0]
        source = script.read_text(encoding="utf-8")
        for option in (word for word in rest[1:] if word.startswith("--")):
            assert re.search(rf'"{option}"', source), f"{rest[0]} has no option {option}"
    elif program == "pip":
        extras = set(re.findall(r"\[(\w+)\]", " ".join(rest)))
        config = configparser.ConfigParser()
        config.read(REPOSITORY / "setup.cfg")
        assert extras <= set(config["options.extras_require"])
    elif program in ("sbatch", "ray"):
        files = [word for word in rest if word.startswith("examples/")]
        assert all((REPOSITORY / name).exists() for name in files)
        for word in rest:
            if word.startswith("tune-hypergrad "):
                looked_up(shlex.split(word))
    elif program.startswith("./") or program.startswith(".ci/"):
        assert (REPOSITORY / program).exists()
    else:
        tools = ("pytest", "coverage", "mkdocs", "ruff", "mypy", "pre-commit")
        assert program in (*tools, "python3", "source", "git", "cd", "grep"), program


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_kinds_that_are_tried(page):
    for block in blocks(page):
        assert block.language in ("python", "sh", "setup", "diff", "text", "json"), f"{block.where}: {block.language!r}"
        if block.language in ("python", "setup"):
            ast.parse(block.code, block.where)
        elif block.language == "sh":
            for words in block.commands():
                try:
                    looked_up(words)
                except Exception as error:
                    raise AssertionError(f"{block.where}: {' '.join(words)}: {error}") from error
        assert block.reason is None or len(block.reason) > 10, f"{block.where} does not say why it is not run"


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_text_exist(page):
    for command in inline_commands(page):
        command = re.sub(r" \[OPTION \.\.\.\]| [A-Z_]+ \.\.\.|[\[\]]", "", command)
        if command.split()[:2] not in (["tune-hypergrad", "COMMAND"],):
            try:
                looked_up(shlex.split(command))
            except Exception as error:
                raise AssertionError(f"{page}: {command}: {error}") from error


def tried(page: str) -> list[Block]:
    """What is run of a page."""
    of_page = [block for block in blocks(page) if block.reason is None and block.language in ("python", "sh", "setup")]
    return [block for block in of_page if block.language != "sh" or block.commands()[0][0] == "tune-hypergrad"]


ALL = {page: tried(page) for page in PAGES}
TRIED = {page: found for page, found in ALL.items() if any(block.language != "setup" for block in found)}


def test_what_is_written_otherwise_is_there():
    for page, changes in SMALLER.items():
        code = "\n".join(block.code for block in TRIED[page])
        for old, new in changes:
            assert old in code, f"{page} has no {old!r} any more"
            code = code.replace(old, new)
    assert {*BEFORE, *WITH_RAY, *NEEDS} <= set(TRIED)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in (*WITH_RAY, *NEEDS) else ()) for page in TRIED]
)
def test_pages_run(page, request, tmp_path, monkeypatch, capsys):
    for needed in NEEDS.get(page, ()):
        pytest.importorskip(needed)
    if page in WITH_RAY:
        import ray.train.constants

        request.getfixturevalue("ray_session")
        monkeypatch.setattr(ray.train.constants, "DEFAULT_STORAGE_PATH", str(tmp_path / "ray_results"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = {"__name__": "page"}  # a module that nobody can import: what it defines goes to workers by value
    exec(compile(BEFORE.get(page, ""), page, "exec"), names)
    titles = [block.title for block in TRIED[page] if block.title]
    try:
        for block in TRIED[page]:
            code = smaller(page, block.code)
            if block.title:
                Path(block.title).write_text(code)
            if block.language == "sh":
                for words in Block(page, block.line, "sh", code).commands():
                    cli.app(words[1:], standalone_mode=False)
            else:  # with the page's line numbers
                exec(compile("\n" * block.line + code, str(PAGES[page]), "exec"), names)
    finally:
        torch.set_num_threads(threads)
        for title in titles:
            sys.modules.pop(Path(title).stem, None)


def test_the_command_lines_page_is_current():
    spec = importlib.util.spec_from_file_location("command_line", DOCS / "reference" / "command_line.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/reference/command_line.py"


def referred() -> set[str]:
    """The names that have an entry in the reference."""
    pages = (DOCS / "reference" / name for name in ("api.md", "engine.md"))
    return {line.split()[1] for page in pages for line in page.read_text().splitlines() if line.startswith(":::")}


def test_every_public_name_has_a_docstring_and_an_entry_in_the_reference():
    entries = {name.rsplit(".", 1)[-1] for name in referred()}
    assert set(tune_hypergrad.__all__) <= entries
    for name in tune_hypergrad.__all__:
        assert (getattr(tune_hypergrad, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_entries_of_the_reference_exist():
    for entry in referred():
        module, name = entry.rsplit(".", 1)
        if "bridges" not in module:  # with libraries that are optional
            assert hasattr(importlib.import_module(module), name), entry


def imported_names(code: str) -> Iterator[str]:
    """What a program takes from this package, by module and name."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tune_hypergrad":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_pages_and_examples_import_public_names():
    entries = {name.rsplit(".", 1)[-1] for name in referred()}
    modules = {name.rsplit(".", 1)[0] for name in referred()}
    sources = {path.name: path.read_text() for path in (REPOSITORY / "examples").glob("*.py")}
    of_users = [page for page in PAGES if page != INSIDE]
    sources |= {block.where: block.code for page in of_users for block in blocks(page) if block.language == "python"}
    for where, code in sources.items():
        for name in imported_names(code):
            module, last = name.rsplit(".", 1)
            assert last in entries or name in modules, f"{where} imports {name}, which is not in the reference"
            if module == "tune_hypergrad" and last in entries:
                assert last in tune_hypergrad.__all__ or name in modules, f"{where}: {name} is not in __all__"


def test_the_version_stands_in_one_place():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    version = config["metadata"]["version"]
    assert tune_hypergrad.__version__ == version
    assert f"version: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"## [{version}]" in changes or f"What will be {version}" in changes
