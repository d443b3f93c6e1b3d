"""What blocks of the documentation stand on, where a page does not show it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from comparisons import write_comparison
from paths import REPOSITORY

from tune_hypergrad.cli import app

EXAMPLES = REPOSITORY / "examples"


def small_comparison(folder: str) -> None:
    """A finished comparison in `folder`, made up, with its report."""
    if not Path(folder).exists():
        write_comparison(Path(folder), ("fds", "rs"), (0,), interrupted=False)
        app(["report", folder], standalone_mode=False)


def trainer_parts() -> tuple[Any, Any, Any, Any]:
    """A script of transformers' `Trainer`: its model, arguments and data."""
    names = runpy.run_path(str(EXAMPLES / "transformers_trainer.py"))
    names["ARGS"].num_train_epochs = 1
    return names["model_init"], names["ARGS"], names["TRAIN"], names["VAL"]


def lightning_parts() -> tuple[Any, Any]:
    """A script of Lightning: its module and its data."""
    names = runpy.run_path(str(EXAMPLES / "lightning_module.py"))
    return names["Module"], names["Digits"]
