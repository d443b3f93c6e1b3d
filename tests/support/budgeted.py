"""Trials whose loss falls with their budget, which cost a worker as little as `bowls`."""

import math
import os
import time

from ray import tune


def loss(config, budget):
    return (config["x"] - 0.3) ** 2 + (math.log10(config["y"]) + 1) ** 2 / 10 + 0.5 / budget


def heeds(config):
    """A user's function that ends at its budget."""
    for step in range(1, int(config["budget"]) + 1):
        tune.report({"loss": loss(config, step)})


def goes_on(config):
    """A user's function: reports for ever, however small its budget."""
    for step in range(1, 100):
        tune.report({"loss": loss(config, step), "epoch": step})
        time.sleep(0.01)


def fails_once(config):
    """Some configurations fail at their first attempt, some at every attempt."""
    if config["x"] < 0.2 or (config["x"] < 0.3 and not os.path.exists("attempted")):
        with open("attempted", "w"):
            raise RuntimeError("as planned")
    tune.report({"loss": loss(config, config["budget"])})


class WithoutReset(tune.Trainable):
    """Cannot be reused, though it is asked to be."""

    def step(self):
        return {"loss": loss(self.config, self.config["budget"]), "done": True}


class Saves(tune.Trainable):
    """Reports how many steps it has taken by itself, fails once on the way, and ends at its budget."""

    def setup(self, config):
        self.position = self.own = 0

    def reset_config(self, new_config):
        self.setup(new_config)
        return True

    def step(self):
        self.position += 1
        self.own += 1
        return {
            "loss": loss(self.config, self.position),
            "own": self.own,
            "done": self.position >= self.config["budget"],
        }

    def save_checkpoint(self, checkpoint_dir):
        return {"position": self.position}

    def load_checkpoint(self, checkpoint):
        self.position = checkpoint["position"]


def saves(config):
    """The same as a function."""
    checkpoint = tune.get_checkpoint()
    begun = 0
    if checkpoint is not None:
        with checkpoint.as_directory() as folder, open(f"{folder}/position") as file:
            begun = int(file.read())
    for step in range(begun + 1, int(config["budget"]) + 1):
        with open("position", "w") as file:
            file.write(str(step))
        tune.report({"loss": loss(config, step), "own": step - begun}, checkpoint=tune.Checkpoint.from_directory("."))
