"""Trials that take no time, for tests of searchers; importing them costs a worker as little as can be."""

import time
from pathlib import Path

from ray import tune

BEST = 0.3


REPEAT = "__trial_index__"  # where Ray's `Repeater` tells a trial which of the repeats it is


def value(config):
    """A trial's metric; of repeated ones, the first is the better the worse their mean is."""
    mean = abs(config["x"] - BEST)
    return mean + 2 * mean * (config[REPEAT] - 1) if REPEAT in config else mean


class Bowl(tune.Trainable):
    """One result per trial, after `seconds`."""

    seconds = 0.0

    def step(self):
        time.sleep(self.seconds)
        slope = 1.0 if self.config["x"] > BEST else -1.0
        return {"val_loss": value(self.config), "hypergradient/x/0": slope, "done": True}

    def save_checkpoint(self, checkpoint_dir):
        return {}

    def load_checkpoint(self, checkpoint):
        pass

    def reset_config(self, new_config):
        self.config = new_config
        return True


class SlowBowl(Bowl):
    seconds = 0.3


class LongBowl(Bowl):
    """Thirty results."""

    def step(self):
        return {**super().step(), "done": self.iteration >= 29}


class WithoutReset(tune.Trainable):
    """Cannot be reused, though it is asked to be."""

    def step(self):
        slope = 1.0 if self.config["x"] > BEST else -1.0
        return {"val_loss": value(self.config), "hypergradient/x/0": slope, "done": True}


class Counted(Bowl):
    """Leaves a line for each of its runs."""

    seconds = 0.05

    def step(self):
        with Path(self.config["runs"]).open("a") as file:
            file.write(f"{self.config['x']} {self.config.get('budget')} {self.config.get('seed')}\n")
        return super().step()
