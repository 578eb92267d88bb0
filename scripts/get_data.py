# Generated from notebooks/00_get_data.ipynb by `make scripts`: edit the notebook, not this file.
"""Downloads the images that the networks learn from and the model that finds faces, and checks them."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def tell_in_one_line(kind, error, trace):
    """Tell what ends the imports as utils.run_script tells what ends the rest: Ctrl-C, or a Keras that cannot start."""
    if kind.__name__ not in ("KeyboardInterrupt", "InputError"):
        sys.__excepthook__(kind, error, trace)
    else:
        print("interrupted" if kind is KeyboardInterrupt else f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = tell_in_one_line

import filecmp
import hashlib
import itertools
import os
import pathlib
import shutil
import socket
import stat
import tarfile
import zipfile

import numpy as np

import utils

SOURCES = (  # tried in this order
    "https://assets.01-edu.org/ai-branch/project3/"
    "challenges-in-representation-learning-facial-expression-recognition-challenge.zip",
    "https://assets.01-edu.org/ai-branch/project3/emotions-detector.zip",
)
KAGGLE = "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge/data"
YUNET_SOURCE = (
    "https://github.com/opencv/opencv_zoo/raw/main/models/face_detection_yunet/face_detection_yunet_2023mar.onnx"
)
YUNET_SHA256 = utils.YUNET_SHA256
KAGGLE_DIGITS = "https://www.kaggle.com/c/digit-recognizer/data"
MNIST_SOURCE = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"  # that of keras.datasets.mnist
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"


def download(url, folder, timeout, sha256=None):
    """Download a file, with a progress bar in a terminal.

    Args:
        url: its address.
        folder: a temporary folder for it.
        timeout: seconds of silence after which the server is given up.
        sha256: of the file as it should be, where that is known.

    Returns:
        Path of the whole file.

    Raises:
        utils.InputError: it cannot be had, breaks off, or is another file.
        OSError: Keras, which downloads it, does not start.
    """
    try:
        keras = utils.import_keras()
    except utils.InputError as error:
        raise OSError(str(error)) from None  # another address would not help
    if not sys.stdout.isatty():  # in a log, a progress bar is a thousand lines
        keras.config.disable_interactive_logging()
        print(f"downloading {url}", flush=True)
    usual = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(timeout)
        return Path(keras.utils.get_file("download", url, file_hash=sha256, cache_dir=folder, cache_subdir=""))
    except Exception as error:  # Keras wraps urllib's errors, which say more, in a bare Exception
        raise utils.InputError(f"cannot download {url}: {utils.shorten(error.__context__ or error)}") from None
    finally:
        socket.setdefaulttimeout(usual)


def get_detector(url, path, timeout):
    """Put YuNet at `path`, unless it is there; if it cannot be had, say so, and leave there only what finds faces."""
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == YUNET_SHA256:
        print(f"YuNet is already at {utils.show_path(path)}")
        return
    try:
        with utils.temporary_folder(path.parent) as folder:
            download(url, folder, timeout, YUNET_SHA256).replace(path)
        print(f"YuNet is at {utils.show_path(path)}")
    except utils.InputError as error:
        try:
            name = utils.FaceDetector(path).name  # another version of YuNet finds faces too
        except utils.InputError:
            path.unlink()
            name = "Haar"
        what = {"Haar": "OpenCV's Haar cascade, which misses more", "YuNet": "the model that is there, an unknown one"}
        print(f"note: {error}; faces will be found with {what[name]}", file=sys.stderr)


def check_split(split, folder):
    """Raise utils.InputError unless the rows of a split, train or test, are those that were published."""
    if not utils.find_fer2013(split, folder):
        names = ", ".join(utils.FER2013_SOURCES[split])
        raise utils.InputError(f"the {split} set is missing ({names})")
    labels = utils.load_fer2013(split, folder)[1]
    usages = ("Training",) if split == "train" else ("PublicTest", "PrivateTest")
    published = [utils.FER2013_CLASS_COUNTS[usage] for usage in usages]
    counts, expected = np.bincount(labels, minlength=len(utils.EMOTIONS)), np.sum(published, axis=0)
    if (counts != expected).any():
        rows = " + ".join(f"{sum(part):,}" for part in published)
        classes = [
            f"{emotion} {count:,} instead of {right:,}"
            for emotion, count, right in zip(utils.EMOTIONS, counts, expected, strict=True)
            if count != right
        ]
        raise utils.InputError(f"the {split} set has {counts.sum():,} rows; expected {rows} ({', '.join(classes)})")


def find_problems(folder):
    """Return what is wrong with the FER2013 in `folder`, a dict from split to sentence; empty if it is complete."""
    problems = {}
    for split in utils.FER2013_SOURCES:
        try:
            check_split(split, folder)
        except utils.InputError as error:
            problems[split] = str(error)
    return problems


FILES = {"test.csv"}.union(*utils.FER2013_SOURCES.values())
MAX_BYTES = utils.MAX_BYTES


def extract(archive, folder):
    """Write the files of FER2013 that are anywhere in an archive flat into `folder`.

    Args:
        archive: path of a zip, or of one of the files, such as fer2013.tar.gz or fer2013.csv, which is read as it is.
        folder: a temporary folder.

    Raises:
        utils.InputError: it is another file, or one that would write outside or fill the disk.
        Exception: of nearly any kind, it is broken or encrypted.
    """
    if archive.suffix.lower() == ".csv":
        shutil.copy(archive, folder / (archive.name if archive.name in FILES else "fer2013.csv"))
        return
    if tarfile.is_tarfile(archive):
        shutil.copy(archive, folder / "fer2013.tar.gz")
        return
    if not zipfile.is_zipfile(archive):
        with open(archive, "rb") as file:
            start = file.read(20)
        raise utils.InputError(f"it is not a whole .zip or .tar.gz file (it begins with {start}); download it again")
    with zipfile.ZipFile(archive) as file:
        members = {member: pathlib.PureWindowsPath(member.filename) for member in file.infolist()}  # / or \
        for member, name in members.items():
            if name.anchor or ".." in name.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise utils.InputError(f"{member.filename!r} in it is a link or leads out of the folder; refused")
        size = sum(member.file_size for member in members)
        if size > MAX_BYTES:
            raise utils.InputError(f"it unpacks to {size:,} bytes; expected less than {MAX_BYTES:,}")
        for member, name in members.items():
            if name.name in FILES and not member.is_dir():
                with file.open(member) as source, open(folder / name.name, "wb") as target:
                    shutil.copyfileobj(source, target)


def keep_edited(target, new):
    """Give a CSV file of FER2013 another name if it reads and is another one than the new one: somebody's work."""
    try:
        if target.suffix != ".csv" or not target.is_file() or filecmp.cmp(target, new, shallow=False):
            return
        utils.read_fer2013_csv(target)
    except utils.InputError:
        return  # it is broken
    kept = next(name for i in itertools.count(1) if not (name := target.with_name(f"{target.name}.old{i}")).exists())
    target.replace(kept)
    print(f"note: {utils.show_path(target)} was another file; it is kept as {kept.name}", file=sys.stderr)


def add_archive(archive, name, folder):
    """Move the files of FER2013 from an archive into `folder`: all of them if all are right, or none.

    Args:
        archive: path of a zip, or of one of the files of FER2013.
        name: what the user calls it.
        folder: where the files go.

    Raises:
        utils.InputError: it is broken, or holds something else.
    """
    with utils.temporary_folder(folder) as temporary:
        try:
            extract(archive, temporary)
            splits = [split for split in utils.FER2013_SOURCES if utils.find_fer2013(split, temporary)]
            if not splits:
                raise utils.InputError(f"no FER2013 in it; expected one of {', '.join(sorted(FILES - {'test.csv'}))}")
            print(f"checking every row of the {' and the '.join(splits)} set", flush=True)
            for split in splits:
                check_split(split, temporary)
        except Exception as error:  # a broken archive raises nearly anything
            message = utils.shorten(str(error).replace(f"{temporary}{os.sep}", ""), 200)
            raise utils.InputError(f"{name}: {message}") from None
        for path in [path for path in temporary.rglob("*") if path.is_file()]:  # the cache moves along
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            keep_edited(target, path)
            path.replace(target)


def add_downloads(sources, folder, timeout):
    """Download an archive from one source after the other into `folder`, until FER2013 is complete there."""
    for url in sources:
        try:
            with utils.temporary_folder(folder) as temporary:
                add_archive(download(url, temporary, timeout), url, folder)
        except utils.InputError as error:
            print(f"note: {error}", file=sys.stderr)
        if not find_problems(folder):
            return


def get_fer2013(archive, sources, folder, timeout):
    """Complete the FER2013 in `folder`.

    Args:
        archive: path of a zip, or of one of the files of FER2013; empty to download a zip.
        sources: addresses to download it from, tried in turn.
        folder: where its files go.
        timeout: seconds of silence after which a server is given up.

    Raises:
        utils.InputError: there is no whole training set in the end, the archive is not what it should be, or another
            process fills the folder.
    """
    if not find_problems(folder):
        print(f"FER2013 is already complete in {utils.show_path(folder)}")
        return
    if archive and not Path(archive).is_file():
        raise utils.InputError(f"no file at {archive}; expected the downloaded zip, or fer2013.tar.gz")
    with utils.locked(folder):
        if archive:
            add_archive(Path(archive), archive, folder)
        else:
            add_downloads(sources, folder, timeout)
    problems = find_problems(folder)
    if "train" in problems:
        there = utils.find_fer2013("train", folder)
        advice = f"get the zip in a browser ({KAGGLE}) and give it with --archive"
        if archive and there:  # the archive's own files were checked
            advice = f"delete {there.name}, which is read first"
        raise utils.InputError(f"{folder}: {utils.shorten(problems['train'], 120)}; {advice}")
    if problems:
        print(
            f"note: {folder}: {problems['test']}; so scripts/predict.py cannot compute the accuracy. "
            f"icml_face_data.csv holds the labels: download the zip from {KAGGLE} and give it with --archive",
            file=sys.stderr,
        )
    else:
        print(f"FER2013 is complete in {utils.show_path(folder)}")


DIGIT_FILES = ("train.csv", "test.csv")


def get_digits(url, folder, timeout):
    """Put the digits into `folder`, as digit-recognizer has them, unless they are there; if they cannot be had, say so.

    train.csv gets three of five digits, label,pixel0..pixel783; test.csv the others, without their labels.
    """
    import pandas as pd

    there = [name for name in DIGIT_FILES if (folder / name).is_file()]
    if len(there) == len(DIGIT_FILES):
        print(f"the digits are already in {utils.show_path(folder)}")
        return
    if there:
        print(
            f"note: {folder / there[0]} is there without the other of {' and '.join(DIGIT_FILES)}, and stays: add the "
            "other from Kaggle, or delete this one to get MNIST",
            file=sys.stderr,
        )
        return
    try:
        with utils.temporary_folder(folder) as temporary:
            with np.load(download(url, temporary, timeout, MNIST_SHA256)) as mnist:
                images = np.concatenate([mnist["x_train"], mnist["x_test"]]).reshape(-1, 784)
                labels = np.concatenate([mnist["y_train"], mnist["y_test"]])
            order = np.random.default_rng(0).permutation(len(labels))
            table = pd.DataFrame(images[order], columns=[f"pixel{i}" for i in range(784)])
            cut = len(labels) * 3 // 5
            table[cut:].to_csv(temporary / "test.csv", index=False)
            table.insert(0, "label", labels[order])
            table[:cut].to_csv(temporary / "train.csv", index=False)
            for name in DIGIT_FILES:
                (temporary / name).replace(folder / name)
        print(f"the digits are in {utils.show_path(folder)}, as MNIST has them; Kaggle's own are at {KAGGLE_DIGITS}")
    except utils.InputError as error:
        print(
            f"note: {error}; so there are no digits. {KAGGLE_DIGITS} has train.csv and test.csv: "
            f"put them into {folder}",
            file=sys.stderr,
        )


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--archive",
        type=str,
        default="",
        help="the zip, fer2013.tar.gz or fer2013.csv, if it is already downloaded; empty to download it",
    )
    parser.add_argument(
        "--only-detector",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="get the face detector alone, which is all that the live stream needs (default: %(default)s)",
    )
    parser.add_argument(
        "--sources",
        type=str,
        default="",
        help="addresses of the zip, with blanks between, tried in turn; empty for the two built-in ones",
    )
    parser.add_argument(
        "--detector-source", type=str, default="", help="address of the face detector; empty for OpenCV's model zoo"
    )
    parser.add_argument(
        "--digits-source", type=str, default="", help="address of mnist.npz; empty for the one of keras.datasets.mnist"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        help="seconds of silence after which a server is given up (default: %(default)s)",
    )
    parser.add_argument("--data", type=str, default="", help="folder for all of it; empty for data")
    return parser.parse_args(argv)


def main(
    archive: str, only_detector: bool, sources: str, detector_source: str, digits_source: str, timeout: float, data: str
):
    folder = utils.output_folder(data, utils.DATA)
    get_detector(detector_source or YUNET_SOURCE, folder / utils.YUNET.relative_to(utils.DATA), timeout)

    if not only_detector:
        get_fer2013(archive, sources.split() or SOURCES, folder, timeout)

    if not only_detector:
        get_digits(digits_source or MNIST_SOURCE, folder / "digit-recognizer", timeout)


if __name__ == "__main__":
    utils.run_script(main, parse_args)
