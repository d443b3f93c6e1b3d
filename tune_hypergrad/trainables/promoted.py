"""Trials that continue where a shorter trial of the same configuration ended."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from pyarrow.fs import FileSelector, FileType
from ray import tune
from ray.tune.trainable import wrap_function

from tune_hypergrad.errors import InputError
from tune_hypergrad.trainables.checkpoints import checkpoint_number, checkpoints_in, read_result

PROMOTED_FROM = "promoted_from"
"""Key in a trial's config: the id of the trial to continue."""

_PROGRESS = "tune_hypergrad_progress"
_COUNTERS = ("_iteration", "_time_total", "_timesteps_total", "_episodes_total")

_logger = logging.getLogger(__name__)


class ContinuesPromoted(tune.Trainable):
    """Mixin for trainables: a trial with `PROMOTED_FROM` in its config begins from that trial's last checkpoint.

    Its `training_iteration` and `time_total_s` go on from there. Without a checkpoint it trains from scratch, and says
    so in the log. The checkpoint is looked for where Ray keeps the experiment, in the folder whose name has the trial's
    id: leave `trial_dirname_creator` unset.
    """

    def setup(self, config: dict[str, Any], **parameters: Any) -> None:
        """Called by Ray when an actor starts."""
        super().setup(config, **parameters)
        self._continue_promoted(config)

    def reset(self, new_config: dict[str, Any], storage: Any = None) -> bool:
        """Called by Ray when an actor is reused for another trial."""
        was_reset = super().reset(new_config, storage=storage)  # type: ignore[no-untyped-call]
        if was_reset:
            self._continue_promoted(new_config)
        return bool(was_reset)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Called by Ray: the checkpoint says how far the trial had come."""
        saved = super().save(checkpoint_dir)
        if saved.checkpoint is not None:
            saved.checkpoint.update_metadata({_PROGRESS: {name: getattr(self, name) for name in _COUNTERS}})
        return saved

    def load_promoted(self, checkpoint: tune.Checkpoint) -> None:
        """Begin from a shorter trial's last checkpoint."""
        self.restore(checkpoint)
        for name, value in checkpoint.get_metadata().get(_PROGRESS, {}).items():
            setattr(self, name, value)

    def _continue_promoted(self, config: dict[str, Any]) -> None:
        shorter = config.get(PROMOTED_FROM)
        if shorter is None:
            return
        assert self._storage is not None
        own = self._storage.trial_dir_name
        if f"_{self.trial_id}_" not in str(own):
            raise InputError(
                f"the folder {own} is not named after its trial {self.trial_id}, so trial "
                f"{shorter}'s cannot be found either: leave trial_dirname_creator unset"
            )
        checkpoint = _last_checkpoint(self._storage, shorter)
        if checkpoint is None:
            _logger.warning("trial %s has no checkpoint to continue: training from scratch", shorter)
        else:
            self.load_promoted(checkpoint)


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
    filesystem, experiment = storage.storage_filesystem, storage.experiment_fs_path
    # A trial without a checkpoint may have no folder there yet: Ray brings its log files when it likes.
    found = filesystem.get_file_info(FileSelector(experiment, allow_not_found=True))
    trials = [info.path for info in found if info.type == FileType.Directory and f"_{trial_id}_" in info.base_name]
    checkpoints = [checkpoint for trial in trials for checkpoint in checkpoints_in(filesystem, trial)]
    whole = [checkpoint for checkpoint in checkpoints if read_result(checkpoint) is not None]  # in a comparison
    return max(whole or checkpoints, key=checkpoint_number, default=None)
