"""Trials that continue where a shorter trial of the same configuration ended."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, cast

from pyarrow.fs import FileSelector, FileType
from ray import tune
from ray.tune.search.repeater import TRIAL_INDEX
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
    so in the log; so do all repeats but the first under Ray's `Repeater`, since searchers know the first one's trial
    only. The checkpoint is looked for where Ray keeps the experiment: in the folder whose name has the trial's id, as
    Ray's own names do; a trial whose folder has another name leaves a note there of which it is.
    """

    _noted: str | None = None  # the trial whose folder longer ones can find

    def setup(self, config: dict[str, Any], **parameters: Any) -> None:
        """Begin a trial as an actor starts, from its config."""
        super().setup(config, **parameters)
        self._continue_promoted(config)

    def reset(self, new_config: dict[str, Any], storage: Any = None) -> bool:
        """Begin another trial in the same actor, from its config."""
        was_reset = super().reset(new_config, storage=storage)  # type: ignore[no-untyped-call]
        if was_reset:
            self._continue_promoted(new_config)
        return bool(was_reset)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save the inner trainable, and how far the trial had come."""
        saved = super().save(checkpoint_dir)
        if saved.checkpoint is not None:
            saved.checkpoint.update_metadata({_PROGRESS: {name: getattr(self, name) for name in _COUNTERS}})
            if self._storage is not None and self._noted != self.trial_id:
                _note_folder(self._storage, self.trial_id)
                self._noted = self.trial_id
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
        if config.get(TRIAL_INDEX):
            _logger.warning("trial %s is another repeat than this one: training from scratch", shorter)
            return
        assert self._storage is not None
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
    `tune.with_parameters` and `tune.with_resources` go around this or within it.

    Args:
        trainable: a function or a class that saves checkpoints; steps since its last one are repeated.
    """
    base = trainable if inspect.isclass(trainable) else _class_of(trainable)
    if issubclass(base, ContinuesPromoted):
        return base
    return type(getattr(trainable, "__name__", base.__name__), (ContinuesPromoted, base), {})


def _class_of(function: Callable[..., Any]) -> type[tune.Trainable]:
    """A function as a trainable class, to which `tune.with_parameters` may give the function's further arguments."""
    further = list(inspect.signature(function).parameters.values())[1:]
    needed = [p.name for p in further if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    of_config = update_wrapper(partial(function, **dict.fromkeys(needed)), function)  # with its resources
    del of_config.__wrapped__  # which would be asked for its arguments in its place
    base: Any = wrap_function(of_config)

    class OfFunction(base):  # type: ignore[misc]
        def setup(self, config: dict[str, Any], **parameters: Any) -> None:
            missing = [name for name in needed if name not in parameters]
            if missing:
                raise InputError(
                    f"{self} has no {missing[0]!r}, which it needs beside its config: give it by "
                    f"tune.with_parameters(trainable, {missing[0]}=...)"
                )
            self._parameters = parameters
            super().setup(config)

        def _trainable_func(self, config: dict[str, Any]) -> Any:
            return cast("Any", wrap_function(partial(function, **self._parameters)))._trainable_func(self, config)

    return OfFunction


def _note_folder(storage: Any, trial_id: str) -> None:
    """Note in a trial's folder which trial it is of, so that longer ones find it where its name does not tell."""
    if not _is_named_after(trial_id, storage.trial_dir_name):
        with storage.storage_filesystem.open_output_stream(_note_path(storage, trial_id)) as stream:
            stream.write(storage.trial_dir_name.encode())


def _noted_folder(storage: Any, trial_id: str) -> str | None:
    filesystem, path = storage.storage_filesystem, _note_path(storage, trial_id)
    if filesystem.get_file_info(path).type == FileType.NotFound:
        return None
    with filesystem.open_input_stream(path) as stream:
        return f"{storage.experiment_fs_path}/{stream.read().decode()}"


def _note_path(storage: Any, trial_id: str) -> str:
    return f"{storage.experiment_fs_path}/.folder_of_{trial_id}"


def _is_named_after(trial_id: str, folder: str) -> bool:
    return f"_{trial_id}_" in folder


def _last_checkpoint(storage: Any, trial_id: str) -> tune.Checkpoint | None:
    checkpoints = [
        checkpoint
        for trial in _folders_of(storage, trial_id)
        for checkpoint in checkpoints_in(storage.storage_filesystem, trial)
    ]
    whole = [checkpoint for checkpoint in checkpoints if read_result(checkpoint) is not None]  # in a comparison
    return max(whole or checkpoints, key=checkpoint_number, default=None)


def _folders_of(storage: Any, trial_id: str) -> list[str]:
    noted = _noted_folder(storage, trial_id)
    if noted is not None:
        return [noted]
    # A trial without a checkpoint may have no folder there yet: Ray brings its log files when it likes.
    found = storage.storage_filesystem.get_file_info(FileSelector(storage.experiment_fs_path, allow_not_found=True))
    folders = [info for info in found if info.type == FileType.Directory]
    return [info.path for info in folders if _is_named_after(trial_id, info.base_name)]
