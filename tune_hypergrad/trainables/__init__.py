"""Ray trainables made from a `Problem`."""

from tune_hypergrad.trainables.fds import FDS
from tune_hypergrad.trainables.fixed_schedule import FixedSchedule
from tune_hypergrad.trainables.hd import HD
from tune_hypergrad.trainables.inner_run import InnerRun
from tune_hypergrad.trainables.promoted import continuing
from tune_hypergrad.trainables.stn import STN, CenteredSTN, DeltaSTN

__all__ = ["FDS", "HD", "STN", "CenteredSTN", "DeltaSTN", "FixedSchedule", "InnerRun", "continuing"]
