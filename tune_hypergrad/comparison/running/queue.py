"""`QueueSearch`: configurations from a list, each once."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from tune_hypergrad.searchers.restorable import RestorableSearch


class QueueSearch(RestorableSearch[Mapping[str, Any]]):
    """Suggest given configs in their order; those of trials that an interruption has lost come again first.

    Args:
        configs: what to run.
    """

    def __init__(self, configs: Iterable[Mapping[str, Any]]) -> None:
        super().__init__(metric="val_loss", mode="min")
        self.queue: deque[Mapping[str, Any]] = deque(configs)
        """Configurations that are still to be run."""

    def _take_space(self, config: Mapping[str, Any]) -> bool:
        return True  # the configs are complete

    def _next_work(self) -> Mapping[str, Any] | None:
        return self.queue.popleft() if self.queue else None

    def _config_of(self, work: Mapping[str, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(work))

    def _finish(self, work: Mapping[str, Any], trial_id: str, result: Mapping[str, Any], error: bool) -> None:
        """Results do not matter, and what has failed is not tried again."""

    @property
    def _has_finished(self) -> bool:
        return not self.queue
