"""Trials that continue where a shorter trial of the same configuration ended."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from pyarrow.fs import FileSelector, FileType
from ray import tune
from ray.tune.trainable import wrap_function

PROMOTED_FROM = "promoted_from"
"""Key in a trial's config: the trial to continue, as `{"trial_id": ..., "training_iteration": ...}`."""

_logger = logging.getLogger(__name__)


class ContinuesPromoted(tune.Trainable):
    """Mixin for trainables: a trial with `PROMOTED_FROM` in its config begins from that trial's last checkpoint.

    Its `training_iteration` goes on from there. Without a checkpoint it trains from scratch, and says so in the log.
    The checkpoint is looked for where Ray keeps the experiment, in the folder whose name has the trial's id.
    """

    def setup(self, config: dict[str, Any], **parameters: Any) -> None:
        """Called by Ray when an actor starts."""
        super().setup(config, **parameters)
        self._continue_promoted()

    def reset(self, new_config: dict[str, Any], storage: Any = None) -> bool:
        """Called by Ray when an actor is reused for another trial."""
        was_reset = super().reset(new_config, storage=storage)  # type: ignore[no-untyped-call]
        if was_reset:
            self._continue_promoted()
        return bool(was_reset)

    def load_promoted(self, checkpoint: tune.Checkpoint, training_iteration: int) -> None:
        """Begin from a shorter trial's last checkpoint.

        Args:
            checkpoint: what that trial saved.
            training_iteration: how far it had come then.
        """
        self.restore(checkpoint)
        self._iteration = training_iteration

    def _continue_promoted(self) -> None:
        shorter = self.config.get(PROMOTED_FROM)
        if shorter is None:
            return
        checkpoint = _last_checkpoint(self._storage, shorter["trial_id"])
        if checkpoint is None:
            _logger.warning("trial %s has no checkpoint to continue: training from scratch", shorter["trial_id"])
        else:
            self.load_promoted(checkpoint, shorter["training_iteration"])


def continuing(trainable: Callable[..., Any] | type[tune.Trainable]) -> type[tune.Trainable]:
    """Make any trainable one that continues promoted configurations, for searchers with `resume_promoted=True`.

    ```python
    tuner = tune.Tuner(continuing(train), tune_config=tune.TuneConfig(search_alg=search), ...)
    ```

    A function finds the shorter trial's checkpoint by `tune.get_checkpoint()`, as after a failure.

    Args:
        trainable: a function or a class that saves checkpoints; steps since its last one are repeated.
    """
    base = trainable if inspect.isclass(trainable) else wrap_function(trainable)
    return type(getattr(trainable, "__name__", base.__name__), (ContinuesPromoted, base), {})


def _last_checkpoint(storage: Any, trial_id: str) -> tune.Checkpoint | None:
    filesystem = storage.storage_filesystem

    def folders(path: str, part: str) -> list[str]:
        found = filesystem.get_file_info(FileSelector(path, allow_not_found=True))
        return [info.path for info in found if info.type == FileType.Directory and part in info.base_name]

    checkpoints = [
        checkpoint
        for trial in folders(storage.experiment_fs_path, f"_{trial_id}_")
        for checkpoint in folders(trial, "checkpoint_")
    ]
    return tune.Checkpoint(max(checkpoints), filesystem=filesystem) if checkpoints else None
