"""A transformers Trainer tuned by FDS, and trained as tuned; needs `pip install 'tune_hypergrad[transformers]'`.

python examples/transformers_trainer.py
"""

import os

import torch
from ray import tune
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from tune_hypergrad import FDS, Problem, Schedule, schedule
from tune_hypergrad.bridges.transformers import ScheduleCallback

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Texts(Dataset):
    """Made-up texts of 12 words, and whether most of them are odd."""

    def __init__(self, examples: int, seed: int) -> None:
        self.words = torch.randint(0, 40, (examples, 12), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": (self.words[index] % 2).sum().gt(6).long()}


def model_init() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=12, **SIZES, **NO_DROPOUT))


ARGS = TrainingArguments(
    "trainer", num_train_epochs=4, per_device_train_batch_size=32, per_device_eval_batch_size=256, learning_rate=3e-3,
    weight_decay=0.01, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
)  # fmt: skip
TRAIN, VAL = Texts(640, 0), Texts(256, 1)


def fit(*callbacks: TrainerCallback) -> float:
    trainer = Trainer(None, ARGS, None, TRAIN, VAL, model_init=model_init, callbacks=list(callbacks))
    trainer.train()
    return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    by_hand = fit()
    problem = Problem.from_transformers(model_init, ARGS, TRAIN, VAL)
    space = {"lr": schedule(tune.loguniform(1e-4, 0.03), windows=4), "beta1": tune.uniform(0, 0.99)}
    fds = FDS.from_problem(problem, space=space, outer_steps=8, **problem.defaults.trial_settings(space))
    grid = tune.Tuner(fds, run_config=tune.RunConfig(storage_path=os.getcwd())).fit()
    best = Schedule.from_scalars(grid[0].metrics, "best_schedule")
    print(f"validation loss by hand {by_hand:.3f}, tuned {fit(ScheduleCallback(best)):.3f}; {best}")
