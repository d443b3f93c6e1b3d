"""Language modelling on plain text: layouts, vocabulary, windows, and what is refused; all on texts made here."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import differentiate, make_loop

from tune_hypergrad.errors import InputError
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems.text import (
    LAYOUTS,
    bits_per_word,
    make_vocabulary,
    make_windows,
    read_text,
    text_problem,
    word_cross_entropy,
)

SMALL: dict[str, Any] = {"sequence_length": 5, "batch_size": 2, "embedding": 4, "hidden": 3}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_folder(folder: Path, layout: tuple[str, ...] = LAYOUTS[0]) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder / layout[0], "the cat sat\n the dog ran \n\n" * 20)
    write(folder / layout[1], "the cat ran\n" * 5)
    write(folder / layout[2], "the bird sat\n" * 4)
    return folder


def small_problem(path: Path, **arguments: Any) -> Problem:
    return text_problem(path, **{**SMALL, **arguments})


def refusal(path: Path, **arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        small_problem(path, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_layouts(tmp_path: Path, layout: tuple[str, ...]) -> None:
    train, val, test = read_text(write_folder(tmp_path, layout))
    assert train == ["the", "cat", "sat", "<eos>", "the", "dog", "ran", "<eos>", "<eos>"] * 20
    assert val == ["the", "cat", "ran", "<eos>"] * 5
    assert test == ["the", "bird", "sat", "<eos>"] * 4


def test_the_first_whole_layout_counts(tmp_path: Path) -> None:
    write_folder(tmp_path, LAYOUTS[3])
    write(tmp_path / "ptb.train.txt", "never read")
    assert read_text(tmp_path)[1][:2] == ["the", "cat"]


def test_one_file_is_split_by_contiguous_parts(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(100)]
    assert read_text(write(tmp_path / "book.txt", " ".join(words))) == (words[:90], words[90:95], words[95:])


def test_byte_order_marks_and_line_ends_of_windows_are_no_words(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"\xef\xbb\xbf" + b"a b\r\n" * 20)
    assert [word for part in read_text(file) for word in part] == ["a", "b", "<eos>"] * 20


def test_vocabulary_is_by_frequency_then_alphabet() -> None:
    words = ["b", "b", "c", "a", "a", "d", "<eos>", "<eos>", "<eos>"]
    assert list(make_vocabulary(words)) == ["<eos>", "a", "b", "c", "d", "<unk>"]
    assert list(make_vocabulary(words, 3)) == ["<eos>", "a", "<unk>"]
    assert list(make_vocabulary(words, 99)) == list(make_vocabulary(words))
    assert list(make_vocabulary([*words, *["<unk>"] * 9], 2)) == ["<unk>", "<eos>"]


def test_windows() -> None:
    vocabulary = {"<unk>": 0, **{str(number): number for number in range(1, 10)}}
    inputs, targets = make_windows([str(number) for number in range(1, 11)], vocabulary, 3)
    assert inputs.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert targets.tolist() == [[2, 3, 4], [5, 6, 7], [8, 9, 0]]
    assert inputs.dtype == targets.dtype == torch.int64
    inputs, targets = make_windows([str(number) for number in range(1, 10)], vocabulary, 3, begin=1)
    assert inputs.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert targets.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert make_windows([], vocabulary, 3)[0].shape == (0, 3)


def test_problem_is_whole(tmp_path: Path) -> None:
    problem = small_problem(write_folder(tmp_path), vocabulary_size=5, name="mine")
    problem.check()
    assert (problem.name, problem.batch_size, problem.model_hyperparameters) == ("mine", 2, ())
    assert [len(split) for split in (problem.train, problem.val, problem.test)] == [35, 3, 3]  # type: ignore[arg-type]
    copy = pickle.loads(pickle.dumps(problem))
    assert copy.model()(copy.val.batch(slice(0, 2))[0]).shape == (2, 5, 5)
    assert torch.equal(copy.train.tensors[0], problem.train.tensors[0])  # type: ignore[union-attr, index]


def test_seed_draws_the_first_window_of_training_only(tmp_path: Path) -> None:
    text = " ".join(f"w{number:03}" for number in range(400))
    folder = tmp_path / "text"
    folder.mkdir()
    for name in LAYOUTS[3]:
        write(folder / name, text)
    begins = set()
    for seed in range(10):
        train, val, again = (
            split.tensors[0]  # type: ignore[union-attr, index]
            for made in [small_problem(folder, seed=seed)]
            for split in (made.train, made.val, small_problem(folder, seed=seed).train)
        )
        assert torch.equal(train, again)
        assert val[0].tolist() == list(range(5))
        begins.add(int(train[0, 0]))
    assert len(begins) > 2
    assert begins <= set(range(5))


def test_loss_and_metric_are_means_over_words() -> None:
    output = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    target = torch.randint(7, (3, 4))
    expected = F.cross_entropy(output, target)
    torch.testing.assert_close(word_cross_entropy(output, target), expected)
    torch.testing.assert_close(2 ** bits_per_word(output, target), expected.exp())


def test_a_metric_of_uneven_batches_is_the_mean_over_the_split(tmp_path: Path) -> None:
    problem = small_problem(write_folder(tmp_path))
    assert (len(problem.val), problem.eval_batch_size) == (3, 2)  # type: ignore[arg-type]
    loop = make_loop(problem, 2)
    with loop.running():
        state = loop.initial_state()
        found = loop.evaluate(state, "val")
    inputs, targets = problem.val.tensors  # type: ignore[union-attr, misc]
    output = torch.func.functional_call(problem.model(), loop.unflatten(state.params), (inputs,))
    assert found.metrics["bits_per_word"] == pytest.approx(float(F.cross_entropy(output, targets)) / math.log(2))


def test_hypergradients_of_both_modes_agree(tmp_path: Path) -> None:
    problem = small_problem(write_folder(tmp_path))
    made = problem.model
    problem = problem.replace(model=lambda: made().double())
    found = [
        differentiate(make_loop(problem, 4), {"lr": torch.tensor([0.5, 0.3], dtype=torch.float64)}, mode)
        for mode in ("forward", "reverse")
    ]
    torch.testing.assert_close(found[0].hypergradients["lr"], found[1].hypergradients["lr"])
    assert found[0].hypergradients["lr"].abs().min() > 0


# what is refused


def test_missing_text(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "ptb.train.txt" in message and "--data-dir" in message
    message = refusal(tmp_path)
    assert str(tmp_path) in message and "ptb.train.txt" in message


def test_a_folder_without_one_of_its_files(tmp_path: Path) -> None:
    write_folder(tmp_path, LAYOUTS[1])
    (tmp_path / "wiki.valid.tokens").unlink()
    assert "has wiki.train.tokens and wiki.test.tokens but no wiki.valid.tokens" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "book.txt", text)
    assert refusal(file).startswith(f"{file} has no words")


def test_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes("un café".encode("latin-1") * 100)
    assert f"{file} is not UTF-8 from byte 6 on" in refusal(file)


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "ptb.test.txt").unlink()
    (tmp_path / "ptb.test.txt").mkdir()
    assert "ptb.test.txt cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 36}, "the training text of 180 words has 35 windows of 5, but at least 36 are needed"),
        ({"sequence_length": 16}, "the test text of 16 words has 0 windows of 16, but at least 1 are needed"),
    ],
)
def test_too_short(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    found = refusal(write_folder(tmp_path), **arguments)
    assert message in found and "sequence_length" in found and str(tmp_path) in found


@pytest.mark.parametrize(
    ("argument", "value", "least"),
    [
        ("sequence_length", 0, 1),
        ("batch_size", 2.5, 1),
        ("vocabulary_size", 1, 2),
        ("embedding", 0, 1),
        ("hidden", -1, 1),
        ("layers", True, 1),
    ],
)
def test_sizes_must_be_whole_numbers(tmp_path: Path, argument: str, value: float, least: int) -> None:
    message = refusal(write_folder(tmp_path), **{argument: value})
    assert message == f"{argument} is {value!r}: it must be a whole number of at least {least}"
