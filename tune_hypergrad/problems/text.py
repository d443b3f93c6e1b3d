"""Word-level language modelling on plain text, in Penn Treebank's layout, WikiText's, or one file."""

from __future__ import annotations

import math
import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems.networks import lstm_language_model, require_whole
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.regularisers import (
    ActivationRegularisation,
    DropConnect,
    EmbeddingDropout,
    TemporalActivationRegularisation,
    VariationalDropout,
)

END_OF_LINE = "<eos>"
"""The word that stands for a line's end."""

UNKNOWN = "<unk>"
"""The word that stands for all words outside the vocabulary."""

LAYOUTS = (
    ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
    ("train.txt", "valid.txt", "test.txt"),
)
"""Names of the training, validation and test text in a folder, by layout; the first layout that is found counts."""

HELD_OUT_SHARE = 0.05
"""Share of a single file's words to validate on, and as much to test on: its last parts."""

Parts = tuple[list[str], list[str], list[str]]

_REMEDY = (
    "give (with data_dir= / --data-dir for the problem 'text') a text file, or a folder with Penn Treebank's "
    "ptb.train.txt, ptb.valid.txt and ptb.test.txt, or WikiText's wiki.*.tokens or wiki.*.raw, or train.txt, "
    "valid.txt and test.txt"
)


def text_problem(
    path: str | os.PathLike[str],
    *,
    sequence_length: int = 35,
    batch_size: int = 20,
    vocabulary_size: int | None = None,
    embedding: int = 650,
    hidden: int = 650,
    layers: int = 2,
    seed: int = 0,
    name: str = "text",
) -> Problem:
    """Predict the next word with `lstm_language_model`; its default sizes are those of the self-tuning networks' paper.

    An example is a window of words, int64 [t], with the words one later as its target, int64 [t]; the windows of a
    part follow each other, and words left over at its end are dropped. Losses are means over words, in nats. The
    metric `bits_per_word` is the same in bits, so that the perplexity is `2 ** val_bits_per_word`: not a metric of its
    own, because a mean of batches' perplexities is not the perplexity.

    Args:
        path: a folder in one of `LAYOUTS`, or a text file, of which the last 5 per cent test and the 5 before
            validate. Words are what white space parts; a line's end is the word `<eos>`.
        sequence_length: words in a window.
        batch_size: windows in an inner step.
        vocabulary_size: keep this many of the training text's words, the most frequent, with `<unk>` among them for
            all others; None keeps all.
        embedding: length of a word's vector and of the last LSTM's output.
        hidden: length of the other LSTMs' outputs.
        layers: how many LSTMs.
        seed: draws where the first training window begins, 0 to `sequence_length - 1` words in; no other text
            depends on it.
        name: how reports call the problem.

    Raises:
        InputError: the text is missing, empty, too short or not UTF-8, or a number is too small.

    Source: MacKay et al., "Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response
    Functions", 2019, which carries the state from window to window; here each begins at zero.
    """
    require_whole(sequence_length=sequence_length, batch_size=batch_size)
    require_whole(embedding=embedding, hidden=hidden, layers=layers)
    if vocabulary_size is not None:
        require_whole(least=2, vocabulary_size=vocabulary_size)
    parts = read_text(Path(path).expanduser())
    words = make_vocabulary(parts[0], vocabulary_size)
    begins = (int(np.random.default_rng(fold_seed(seed)).integers(sequence_length)), 0, 0)
    least = (batch_size, 1, 1)
    train, val, test = (
        _checked_windows(part, words, sequence_length, begin, needed, f"{path}: the {which} text")
        for part, begin, needed, which in zip(parts, begins, least, ("training", "validation", "test"), strict=True)
    )
    return Problem(
        # no argument is left open: each would count as a hyperparameter
        model=partial(lstm_language_model, len(words), embedding, hidden, layers),
        train=train,
        val=val,
        test=test,
        loss=word_cross_entropy,
        regularisers=(
            *(VariationalDropout(module, module) for module in ("input_dropout", "hidden_dropout", "output_dropout")),
            EmbeddingDropout(),
            DropConnect(),
            ActivationRegularisation("output_dropout"),
            TemporalActivationRegularisation(f"lstms.{layers - 1}"),
        ),
        metrics={"bits_per_word": bits_per_word},
        batch_size=batch_size,
        eval_batch_size=batch_size,  # logits are as many as words times vocabulary
        name=name,
    )


def word_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean of the words' cross entropies in nats, of `output` [b, vocabulary, t] and `target` int64 [b, t].

    Equal to `F.cross_entropy(output, target)`, in about half the time: logits lie by words, not by classes.
    """
    return F.cross_entropy(output.transpose(1, 2).flatten(0, 1), target.flatten())


def bits_per_word(output: Tensor, target: Tensor) -> Tensor:
    """Mean of the words' cross entropies in bits: `word_cross_entropy`, in nats, of the same arguments, divided by log
    2."""
    return word_cross_entropy(output, target) / math.log(2)


def read_text(path: Path) -> Parts:
    """The words of the training, validation and test text at `path`, a folder in one of `LAYOUTS` or a text file.

    Raises:
        InputError: `path` or one of its files is missing, unreadable, not UTF-8, or without words.
    """
    if os.path.isdir(path):  # unlike the methods of Path, False where access is denied
        train, val, test = (_read_words(path / name) for name in _layout(path))
        return train, val, test
    if not os.path.exists(path):
        raise InputError(f"no text at {path}: {_REMEDY}")
    words = _read_words(path)
    held_out = int(HELD_OUT_SHARE * len(words))
    begin_val, begin_test = len(words) - 2 * held_out, len(words) - held_out
    return words[:begin_val], words[begin_val:begin_test], words[begin_test:]


def make_vocabulary(words: list[str], size: int | None = None) -> dict[str, int]:
    """Each word's index: the most frequent of `words` first, equally frequent ones by alphabet.

    Args:
        words: the training text.
        size: how many to keep at most, `<unk>` among them; it is added where the text lacks it.
    """
    counts = Counter(words)
    counts[UNKNOWN] += 0
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:size]
    if UNKNOWN not in ranked:
        ranked[-1] = UNKNOWN
    return {word: index for index, word in enumerate(ranked)}


def make_windows(words: list[str], vocabulary: dict[str, int], length: int, begin: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both int64 [windows, length]: words from `begin` on, and those one later.

    Targets run through the text without gaps; an incomplete last window is dropped.
    """
    unknown = vocabulary[UNKNOWN]
    indices = torch.tensor([vocabulary.get(word, unknown) for word in words[begin:]], dtype=torch.int64)
    count = max(0, len(indices) - 1) // length
    inputs, targets = indices[: count * length], indices[1 : count * length + 1]
    return inputs.view(count, length), targets.view(count, length)


def _checked_windows(
    words: list[str], vocabulary: dict[str, int], length: int, begin: int, needed: int, where: str
) -> tuple[Tensor, Tensor]:
    inputs, targets = make_windows(words, vocabulary, length, begin)
    if len(inputs) < needed:
        raise InputError(
            f"{where} of {len(words):,} words has {len(inputs)} windows of {length}, but at least {needed} are "
            "needed: give a longer text, or lower sequence_length or batch_size"
        )
    return inputs, targets


def _layout(folder: Path) -> tuple[str, ...]:
    found = {layout: [name for name in layout if os.path.exists(folder / name)] for layout in LAYOUTS}
    for layout, names in found.items():
        if len(names) == len(layout):
            return layout
    closest = max(LAYOUTS, key=lambda layout: len(found[layout]))
    if not found[closest]:
        raise InputError(f"{folder} has no text that is known by its name: {_REMEDY}")
    missing = " and ".join(name for name in closest if name not in found[closest])
    raise InputError(f"{folder} has {' and '.join(found[closest])} but no {missing}: add it, or give one text file")


def _read_words(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 from byte {error.start} on: convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): make it a readable text file") from error
    if not text.strip():
        raise InputError(f"{file} has no words: give a text that has some")
    return text.replace("\n", f" {END_OF_LINE} ").split()
