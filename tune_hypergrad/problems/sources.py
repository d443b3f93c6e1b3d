"""The official files of each downloadable data set, and reading them."""

from __future__ import annotations

from tune_hypergrad.problems.cifar import FOLDER, read_cifar10
from tune_hypergrad.problems.idx import read_labelled_idx
from tune_hypergrad.problems.images import LabelledImages
from tune_hypergrad.problems.storage import DataFile, Storage
from tune_hypergrad.problems.svhn import read_svhn

TrainAndTest = tuple[LabelledImages, LabelledImages]

_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
_FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
_SVHN_MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
_CIFAR10 = DataFile(
    path="cifar-10-python.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    others=(FOLDER,),
)


def load_mnist(storage: Storage) -> TrainAndTest:
    """MNIST, 60,000 and 10,000 images [1, 28, 28] (LeCun et al., 1998)."""
    return _load_idx(storage, "MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist", _MNIST_MD5)


def load_fashion_mnist(storage: Storage) -> TrainAndTest:
    """Fashion-MNIST, 60,000 and 10,000 images [1, 28, 28] (Xiao, Rasul and Vollgraf, 2017)."""
    base = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    return _load_idx(storage, "FashionMNIST", base, _FASHION_MNIST_MD5)


def load_svhn(storage: Storage) -> TrainAndTest:
    """SVHN's cropped digits, 73,257 and 26,032 images [3, 32, 32] (Netzer et al., 2011)."""
    paths = {name: storage.require(_svhn_file(name, md5)) for name, md5 in _SVHN_MD5.items()}
    return read_svhn(paths["train_32x32.mat"]), read_svhn(paths["test_32x32.mat"])


def load_cifar10(storage: Storage) -> TrainAndTest:
    """CIFAR-10, 50,000 and 10,000 images [3, 32, 32] (Krizhevsky, 2009)."""
    return read_cifar10(storage.require(_CIFAR10))


def _load_idx(storage: Storage, folder: str, base: str, md5s: dict[str, str]) -> TrainAndTest:
    paths = {name: storage.require(_idx_file(folder, base, name, md5)) for name, md5 in md5s.items()}
    train, test = (
        read_labelled_idx(paths[f"{part}-images-idx3-ubyte"], paths[f"{part}-labels-idx1-ubyte"])
        for part in ("train", "t10k")
    )
    return train, test


def _idx_file(folder: str, base: str, name: str, md5: str) -> DataFile:
    return DataFile(f"{folder}/raw/{name}.gz", f"{base}/{name}.gz", md5, others=(f"{folder}/raw/{name}",))


def _svhn_file(name: str, md5: str) -> DataFile:
    return DataFile(name, f"http://ufldl.stanford.edu/housenumbers/{name}", md5, others=(f"SVHN/{name}",))
