"""Built-in problems: readers, storage, splits, networks and the registry; all offline, on files made here."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
import scipy.io
import torch
import torch.nn.functional as F

from tune_hypergrad import problems
from tune_hypergrad.errors import InputError
from tune_hypergrad.losses import accuracy, smoothed_cross_entropy
from tune_hypergrad.problems import registry
from tune_hypergrad.problems.cifar import FOLDER, TEST_BATCHES, TRAIN_BATCHES, parse_batch, read_cifar10
from tune_hypergrad.problems.idx import read_idx, read_labelled_idx
from tune_hypergrad.problems.splits import stratified_split
from tune_hypergrad.problems.storage import DATA_ENV, Storage
from tune_hypergrad.problems.svhn import read_svhn

GENERATOR = np.random.default_rng(0)
IMAGE_ENTRIES = [entry for entry in problems.table() if isinstance(entry, registry.ImageEntry)]
IMAGE_PROBLEMS = [entry.name for entry in IMAGE_ENTRIES]


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def images(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return (np.arange(count) % 10).astype(np.uint8)


def write_mnist(root: Path, train: int = 120, test: int = 20, suffix: str = ".gz", folder: str = "MNIST") -> None:
    for part, count in (("train", train), ("t10k", test)):
        write_idx(root / folder / "raw" / f"{part}-images-idx3-ubyte{suffix}", images(count, 28, 28))
        write_idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte{suffix}", labels(count))


def cifar_batch(count: int = 20, protocol: int = 2, **changes: Any) -> bytes:
    batch = {"data": images(count, 3072), "labels": [int(label) for label in labels(count)], **changes}
    return pickle.dumps(batch, protocol=protocol)


def write_cifar(root: Path) -> Path:
    (root / FOLDER).mkdir(parents=True)
    for name in (*TRAIN_BATCHES, *TEST_BATCHES):
        (root / FOLDER / name).write_bytes(cifar_batch())
    return root / FOLDER


def write_svhn(path: Path, count: int = 40, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"X": images(32, 32, 3, count), "y": labels(count)[:, None] + 1, **changes})
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry expects the sizes of the files made here."""
    sizes = {"mnist": (100, 20, 20), "fashion_mnist": (100, 20, 20), "svhn": (30, 10, 20), "cifar10": (80, 20, 20)}
    for entry in IMAGE_ENTRIES:
        data = next((data for data in sizes if entry.name.startswith(data)), None)
        if data is not None:
            train, val, test = sizes[data]
            small_entry = replace(entry, train=train, val=val, test=test, batch_size=8)
            monkeypatch.setitem(registry._ENTRIES, entry.name, small_entry)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# losses


def test_smoothed_cross_entropy_is_torch_s() -> None:
    output, target = torch.randn(7, 10, dtype=torch.float64, generator=torch.manual_seed(0)), torch.arange(7)
    for smoothing in (0.0, 0.3, 1.0):
        expected = F.cross_entropy(output, target, label_smoothing=smoothing)
        for given in (smoothing, torch.tensor(smoothing, dtype=torch.float64), torch.full((7,), smoothing)):
            torch.testing.assert_close(smoothed_cross_entropy(output, target, label_smoothing=given), expected)


def test_smoothed_cross_entropy_is_differentiable_by_the_smoothing() -> None:
    output, target = torch.randn(5, 10, dtype=torch.float64, generator=torch.manual_seed(0)), torch.arange(5)
    smoothing = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: smoothed_cross_entropy(output, target, label_smoothing=s), (smoothing,))


def test_accuracy() -> None:
    assert float(accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))) == 0.75


# idx


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_round_trip(tmp_path: Path, suffix: str) -> None:
    array = images(5, 4, 3)
    assert np.array_equal(read_idx(write_idx(tmp_path / f"x{suffix}", array), 3), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG rest", "begins with 89504e47"),
        (b"", "begins with "),
        (idx_bytes(np.zeros(4, np.uint8)), "begins with 00000801"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8))[:10], "ends inside its header"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8))[:-1], "promises 18 bytes, there are 17"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8)) + b"x", "promises 18 bytes, there are 19"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3), "there are 0"),
    ],
)
def test_idx_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_idx(path, 3)
    assert str(path) in one_line(error)
    assert message in one_line(error)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "corrupt"])
def test_idx_damaged_gzip(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(idx_bytes(images(9, 8, 8)))
    middle = len(whole) // 2
    content = {"truncated": whole[:middle], "not gzip": b"<html>", "corrupt": whole[:middle] + b"\xff" * middle}
    path = tmp_path / "images.gz"
    path.write_bytes(content[damage])
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(path, 3)


def test_idx_labels_must_match(tmp_path: Path) -> None:
    pictures = write_idx(tmp_path / "images", images(12, 4, 4))
    with pytest.raises(InputError, match="12 images but 11 labels"):
        read_labelled_idx(pictures, write_idx(tmp_path / "few", labels(11)))
    wrong = labels(12)
    wrong[3] = 10
    with pytest.raises(InputError, match="label 10 of example 3 is not a class 0 to 9"):
        read_labelled_idx(pictures, write_idx(tmp_path / "wrong", wrong))


# SVHN


def test_svhn_calls_zero_zero(tmp_path: Path) -> None:
    pixels = images(32, 32, 3, 20)
    read = read_svhn(write_svhn(tmp_path / "train_32x32.mat", 20, X=pixels))
    assert read.labels.tolist() == [(label + 1) % 10 for label in labels(20).tolist()]
    assert np.array_equal(read.images[7, 2], pixels[:, :, 2, 7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.zeros((40, 1), np.uint8)}, "whole numbers 1 to 10"),
        ({"y": np.full((40, 1), 11)}, "whole numbers 1 to 10"),
        ({"y": np.full((40, 1), 1.5)}, "whole numbers 1 to 10"),
        ({"y": np.ones((39, 1), np.uint8)}, "40 images but 39 labels"),
        ({"X": np.zeros((32, 32, 40), np.uint8)}, "3 dimensions, not 4"),
        ({"X": np.zeros((32, 32, 3, 40))}, "float64"),
    ],
)
def test_svhn_says_what_is_wrong(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError) as error:
        read_svhn(write_svhn(tmp_path / "a.mat", **changes))
    assert message in one_line(error)


def test_svhn_damaged(tmp_path: Path) -> None:
    path = write_svhn(tmp_path / "a.mat")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"a\.mat: cannot be read as a MATLAB file"):
        read_svhn(path)
    scipy.io.savemat(tmp_path / "b.mat", {"y": 1})
    with pytest.raises(InputError, match="has no variable X"):
        read_svhn(tmp_path / "b.mat")


# CIFAR-10


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_cifar_batch_round_trip(protocol: int) -> None:
    data = images(20, 3072)
    batch = parse_batch(cifar_batch(protocol=protocol, data=data), "batch")
    assert np.array_equal(batch.images, data.reshape(20, 3, 32, 32))
    assert batch.labels.tolist() == labels(20).tolist()


def test_cifar_batch_of_python_2() -> None:
    # what Python 2 wrote: str keys and data as byte strings, NumPy's old module name
    data = images(1, 3072).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01bt\x52(I1\n(I1\nI3072\ntcnumpy\ndtype\n"
        b"(U\x02u1I0\nI1\nt\x52(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\nT" + struct.pack("<i", len(data)) + data + b"tb"
    )
    batch = parse_batch(b"}(U\x04data" + array + b"U\x06labels](I7\neu.", "batch")
    assert batch.images.tobytes() == data
    assert batch.labels.tolist() == [7]


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_cifar_refuses_a_malicious_pickle(tmp_path: Path) -> None:
    content = cifar_batch(data=Malicious(str(tmp_path / "made")))
    with pytest.raises(InputError, match=r"refused, its pickle asks for \w+\.mkdir"):
        parse_batch(content, "batch")
    assert not (tmp_path / "made").exists()
    for code in (b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n.", b"c__builtin__\ngetattr\n."):
        with pytest.raises(InputError, match="refused"):
            parse_batch(code, "batch")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (cifar_batch()[:1000], "cannot be read"),
        (pickle.dumps([1]), "not a dict"),
        (pickle.dumps({"data": 1}), "not a dict"),
        (cifar_batch(data=np.zeros((20, 3071), np.uint8)), "not uint8 rows of 3072"),
        (cifar_batch(data=np.zeros((20, 3072))), "float64"),
        (cifar_batch(data=[1]), "data is list"),
        (cifar_batch(labels=[0] * 19), "20 images but 19 labels"),
        (cifar_batch(labels=[10] * 20), "0 to 9"),
        (cifar_batch(labels=["cat"] * 20), "whole numbers"),
    ],
)
def test_cifar_says_what_is_wrong(content: bytes, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_batch(content, "data_batch_1")
    assert one_line(error).startswith("data_batch_1: ")
    assert message in one_line(error)


def test_cifar_archive_is_the_folder(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, FOLDER)
    for unpacked, packed in zip(read_cifar10(folder), read_cifar10(archive), strict=True):
        assert np.array_equal(unpacked.images, packed.images)
        assert np.array_equal(unpacked.labels, packed.labels)
    archive.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"tar\.gz: cannot be read"):
        read_cifar10(archive)
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("empty"), io.BytesIO())
    with pytest.raises(InputError, match=f"lacks {FOLDER}/data_batch_1"):
        read_cifar10(archive)
    (folder / "data_batch_3").unlink()
    with pytest.raises(InputError, match="data_batch_3: cannot be read"):
        read_cifar10(folder)


# storage


def test_data_directory_is_argument_then_environment_then_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ENV, str(tmp_path / "env"))
    assert Storage(tmp_path / "argument").root == tmp_path / "argument"
    assert Storage().root == tmp_path / "env"
    monkeypatch.delenv(DATA_ENV)
    assert Storage().root == Path(pooch.os_cache("tune_hypergrad"))


@pytest.mark.parametrize("name", [name for name in IMAGE_PROBLEMS if not name.startswith("digits")])
def test_missing_files_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as error:
        problems.get(name, data_dir=tmp_path)
    assert str(tmp_path) in one_line(error)
    assert "--download" in one_line(error)


@pytest.mark.parametrize("failure", [ConnectionError("no network\nmore"), ValueError("hash differs"), OSError()])
def test_failed_download_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def retrieve(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(InputError, match=r"fetching https://\S+cifar-10-python\.tar\.gz into .* failed") as error:
        problems.get("cifar10", data_dir=tmp_path, download=True)
    one_line(error)


@pytest.mark.usefixtures("small")
def test_download_fetches_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    fetched = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> None:
        fetched.append((url, known_hash))
        write_idx(path / fname, labels(20))

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    problems.get("mnist", data_dir=tmp_path, download=True)
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz"
    assert fetched == [(url, "md5:ec29112dd5afa0611ce80d1b7f02629c")]


# splits


def test_stratified_split() -> None:
    classes = GENERATOR.integers(0, 10, 1000)
    kept, held_out = stratified_split(classes, 200, seed=3)
    assert (len(kept), len(held_out)) == (800, 200)
    assert sorted(np.concatenate([kept, held_out]).tolist()) == list(range(1000))
    shares = np.bincount(classes, minlength=10) / 5
    assert np.all(np.abs(np.bincount(classes[held_out], minlength=10) - shares) < 3)
    again, other = stratified_split(classes, 200, seed=3)[1], stratified_split(classes, 200, seed=4)[1]
    assert np.array_equal(held_out, again)
    assert not np.array_equal(held_out, other)


def rows(split: Any) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.tensors[0]]


def test_digits_split_by_seed_but_for_the_test_set() -> None:
    zero, again, one = (problems.get("digits", seed=seed) for seed in (0, 0, 1))
    assert [len(rows(split)) for split in (zero.train, zero.val, zero.test)] == [1100, 300, 397]
    parts = [set(rows(split)) for split in (zero.train, zero.val, zero.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1797  # no two of the 1,797 images are equal
    assert rows(zero.train) == rows(again.train)
    assert rows(zero.val) == rows(again.val)
    assert set(rows(zero.val)) != set(rows(one.val))
    assert rows(zero.test) == rows(one.test)


def test_get_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    problems.get("digits")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


# registry


def test_the_default_problem_is_first_and_the_older_ones_follow() -> None:
    assert problems.names()[:6] == ("digits", "digits_mlp", "mnist", "fashion_mnist", "svhn", "cifar10")
    assert set(problems.names()) == {*IMAGE_PROBLEMS, "text"}


@pytest.mark.parametrize("entry", IMAGE_ENTRIES, ids=IMAGE_PROBLEMS)
def test_network_has_the_weights_of_the_table(entry: registry.ImageEntry) -> None:
    model = entry.make_model()
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert entry.model.endswith(f" {weights:,} weights")
    assert model(torch.zeros(2, *entry.shape)).shape == (2, 10)


def test_published_weight_counts() -> None:
    counts = {entry.name: entry.model for entry in problems.table()}
    assert counts["mnist"] == "LeNet-5, 61,706 weights"
    assert counts["cifar10"] == "WRN-16-1, 175,066 weights"


def test_published_splits() -> None:
    sizes = {entry.name: (entry.train, entry.val, entry.test) for entry in problems.table()}
    assert sizes["mnist_mlp"] == (55_000, 5_000, 10_000)
    assert sizes["fashion_mnist_cnn"] == (51_000, 9_000, 10_000)
    for name in ("cifar10_alexnet", "cifar10_vgg16", "cifar10_resnet18"):
        assert sizes[name] == (40_000, 10_000, 10_000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", IMAGE_PROBLEMS)
def test_problem_is_whole(tmp_path: Path, name: str) -> None:
    write_mnist(tmp_path, suffix="")
    write_mnist(tmp_path, folder="FashionMNIST")
    write_svhn(tmp_path / "SVHN" / "train_32x32.mat", 40)
    write_svhn(tmp_path / "test_32x32.mat", 20)
    write_cifar(tmp_path)
    problem = problems.get(name, data_dir=tmp_path, batch_size=16)
    problem.check()
    assert problem.name == name
    assert problem.batch_size == 16
    assert problem.train_loss_hyperparameters == {"label_smoothing": 0.0}
    assert problem.model_hyperparameters == ()
    copy = pickle.loads(pickle.dumps(problem))
    assert rows(copy.val) == rows(problem.val)
    assert rows(copy.train)[0] == rows(problem.train)[0]
    assert problem.train.tensors[0].dtype == torch.float32  # type: ignore[union-attr]


def test_text_problem_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a line of words\n" * 400)
    problem = problems.get("text", data_dir=file, batch_size=4)
    problem.check()
    assert problem.name == "text"
    assert problem.batch_size == 4
    assert problem.model_hyperparameters == ()
    assert rows(pickle.loads(pickle.dumps(problem)).train) == rows(problem.train)
    with pytest.raises(InputError, match="--data-dir") as error:
        problems.get("text", data_dir=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in one_line(error)


def test_inputs_are_normalised() -> None:
    inputs, _ = problems.get("digits").train.tensors  # type: ignore[union-attr, misc]
    assert abs(float(inputs.mean())) < 0.02
    assert abs(float(inputs.std()) - 1) < 0.02


def test_counts_and_shapes_of_the_data_set_are_required(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(InputError, match="120 images, not the data set's 60,000"):
        problems.get("mnist", data_dir=tmp_path)
    write_idx(tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz", images(120, 8, 8))
    with pytest.raises(InputError, match=r"shape \(1, 8, 8\), not \(1, 28, 28\)"):
        problems.get("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"), [("mnits", "mnist"), ("Fashion-MNIST", "fashion_mnist"), ("CIFAR", "cifar10")]
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        problems.get(name)
    assert one_line(error).endswith(f"did you mean {hint!r}?")
    assert "digits, digits_mlp, mnist" in one_line(error)


@pytest.mark.parametrize("name", ["digits", "digits_mlp"])
def test_digits_learn_with_a_good_rate_and_not_without(name: str) -> None:
    problem = problems.get(name)
    inputs, targets = problem.val.tensors  # type: ignore[union-attr, misc]
    reached = []
    for rate in (0.0, 0.1):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = problem.model()
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
        generator = torch.Generator().manual_seed(0)
        for _ in range(150):
            batch = problem.train.batch(torch.randint(1100, (64,), generator=generator))  # type: ignore[union-attr]
            optimizer.zero_grad()
            problem.loss(model(batch[0]), batch[1]).backward()
            optimizer.step()
            schedule.step()
        reached.append(float(accuracy(model(inputs), targets)))
    assert reached[0] < 0.3
    assert reached[1] > 0.95
