"""What the notebooks, the scripts and the tests share, in the order of the way from a frame to a word.

Paths, errors, data, faces, tracks, video, models, stream, pictures, plots. Importing it has no effects: no seed is set,
no style is changed, and TensorFlow, pandas and matplotlib are imported only by the functions that need them, because
the live stream must start at once.
"""

import ast
import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import math
import os
import pickle
import pickletools
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

# --------------------------------------------------------------------------------------------------------- paths

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"
RUNS = ROOT / "runs"  # checkpoints and logs of trainings: large, temporary, not in git
RESULTS = ROOT / "results"
MODEL = RESULTS / "model" / "my_own_model.pkl"
PRE_TRAINED_MODEL = MODEL.with_name("pre_trained_model.pkl")
CLIP = RESULTS / "preprocessing_test" / "input_video.mp4"  # made in notebooks/extra_bundled_clip
YUNET = DATA / "models" / "face_detection_yunet_2023mar.onnx"
YUNET_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"

EMOTIONS = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")  # FER2013's labels 0 to 6
SIDE = 48  # pixels, both sides of a FER2013 face
MAX_BYTES = 2_000_000_000  # of what is read or unpacked at once; all files of FER2013 together have less than 1 GB


def printable(text):
    """Return text, such as a file's name, as one line that stdout can print, with escapes like \\n where it must."""
    encoding = sys.stdout.encoding or "utf-8"
    text = str(text).encode(encoding, "backslashreplace").decode(encoding)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def show_path(path):
    """Return a path or URL as text for people: relative to the project where it lies inside.

    Of a URL neither user, password nor query are shown, because cameras take passwords in all of them.
    """
    if "://" in str(path):
        scheme, address = str(path).split("://", 1)
        before, at, host = address.rpartition("@")
        if at and re.search("[?#;]", before):  # is that in a password, or is @ in a query?
            return f"{printable(scheme)}://..."
        host = re.sub("(?s)[?#;].*", "", host)
        host = re.sub("(?is)(user|login|pass|pwd|token|key)[^/]*=.*", "...", host)  # cheap cameras have them in paths
        return f"{printable(scheme)}://{printable(host)}"
    path = Path(path)
    return printable(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def opencv_path(path):
    """Return a path as the text that OpenCV takes. Every path goes through here, since others crash the process.

    Raises:
        InputError: its bytes are not UTF-8, as in archives of old systems.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = show_path(path)
        raise InputError(f"OpenCV cannot open {shown}, whose name is not UTF-8: rename the file or folder") from None
    return str(path)


# -------------------------------------------------------------------------------------------------------- errors


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, what was expected, and what to do."""


def shorten(text, most=80):
    """Return text, such as the message of a library, as one line of at most `most` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


LONGEST_LINE = 300  # characters of an error; of a longer one, as with a path of thousands, the middle is left out


def run_script(main, parse_args):
    """Run a script's `main` with the arguments of its command line, and exit.

    `~` at the start of an argument is the home folder, also where a shell leaves it as it is (`--record=~/a.mp4`). What
    ends processes politely (`kill`, `timeout`, `docker stop`, a terminal that is closed) ends a script like Ctrl-C.

    Exit codes: 0; 1 after an error that the user can mend, told in one line on stderr; 130 after Ctrl-C.

    Args:
        main: takes the parsed arguments as keywords, which are annotated with their types.
        parse_args: returns an argparse.Namespace, or exits with 2 as argparse does.
    """
    arguments = {
        name: os.path.expanduser(value) if isinstance(value, str) else value
        for name, value in vars(parse_args()).items()
    }
    for name, value in arguments.items():
        if value == [] and main.__annotations__[name] is not list:  # what argparse makes of --name=-- until Python 3.12
            sys.exit(f"error: --{name.replace('_', '-')} has no value")
    _end_like_ctrl_c()
    try:
        main(**arguments)
    except BrokenPipeError:  # whoever read the output has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        text = printable(f"error: {' '.join(str(error).split())}")
        sys.exit(text if len(text) < LONGEST_LINE else f"{text[:150]} ... {text[-140:]}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end_like_ctrl_c():
    """Let the signals TERM and HUP raise KeyboardInterrupt, once: what is closed then must not be interrupted."""

    def end(*_):
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    for number in numbers:
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, end)


def output_folder(given, default):
    """Return the Path of a folder for results, `given` or, where that is empty, `default`; it need not be there yet.

    Raises:
        InputError: there is something at that path, or on the way to it, that is no folder.
    """
    folder = Path(given or default)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"{show_path(path)} is a file; expected a folder for the results")
    return folder


def _without_scheme(source):
    """Return the path in a file:// address, where %20 is a blank, and what is none as it is."""
    if not source.lower().startswith("file://"):
        return source
    from urllib.request import url2pathname  # here, since it takes a tenth of the time to the first answer

    return url2pathname(source[7:])


def check_output(path, suffix, inputs):
    """Refuse the name of a file to be written that would destroy what is read, or says another kind of file.

    Args:
        path: of the file.
        suffix: such as ".mp4".
        inputs: paths of what is read as `Video` takes them, also what is no file, such as a camera's number.

    Raises:
        InputError: it is a folder or a pipe, ends in another suffix, or is one of the inputs, by a link too.
    """
    path, shown = Path(path), show_path(path)
    if path.suffix.lower() != suffix or path.is_dir() or path.is_fifo():
        raise InputError(f"cannot write {shown}: expected the name of a file that ends in {suffix}")
    for other in map(str, inputs):
        for name in (other, os.path.expanduser(_without_scheme(other.strip()))):
            if path.exists() and os.path.exists(name) and path.samefile(name):
                raise InputError(f"{shown} would be overwritten, and it is what is read: give the output another name")


def check_parameters(notebook):
    """Refuse what a notebook cannot take, as a script's command line does: called right after its `parameters` cell.

    That cell says with annotations which parameters there are. papermill runs what it was given in a cell of its own
    after that one, where a mistyped name is only another variable. As on a command line, a whole number does for a
    float or a text (`-p source 0`), and a text for a list of one.

    Args:
        notebook: its `globals()`; such values are replaced there.

    Raises:
        InputError: there is no such parameter, or it has another type.
    """
    types = notebook["__annotations__"]
    given = next((cell for cell in reversed(notebook["In"]) if cell.startswith("# Parameters\n")), "")
    for name in [statement.targets[0].id for statement in ast.parse(given).body]:
        if name not in types:
            raise InputError(f"there is no parameter {name}; expected one of {', '.join(types)}")
    expected = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list"}
    for name, kind in types.items():
        value = notebook[name]
        if type(value) is int and kind in (float, str):
            notebook[name] = kind(value)
        elif type(value) is str and kind is list:
            notebook[name] = [value]
        elif type(value) is not kind:
            raise InputError(f"parameter {name} is {value!r}; expected {expected[kind]}")


def _lock(file):
    """Lock an open file; OSError if another process has locked it, or where the file system knows no locks."""
    if os.name == "nt":
        import msvcrt  # there is no fcntl on Windows

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(folder, name=""):
    """Keep other processes that ask for it away while the block runs: from a folder, or from the file `name` in it.

    The folder is made if it is not there. A process that is killed lets it go. The file that is locked is empty, and is
    removed at the end; one that is not empty is somebody's own, and stays.

    Raises:
        InputError: another process has it.
    """
    path = Path(folder) / (f".{name}.lock" if name else ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            _lock(file)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError  # the process before this one has just removed it
        except (BlockingIOError, PermissionError, FileNotFoundError):
            shown = show_path(Path(folder) / name)
            raise InputError(f"{shown} is in use by another process: wait for it, or give another name") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            if os.name != "nt" and not os.fstat(file.fileno()).st_size:  # Windows removes no open file
                path.unlink(missing_ok=True)


@functools.cache
def remove_leftovers(folder):
    """Remove what killed processes left of `temporary_folder` in a Path, once: there may be faces in it."""
    for part in folder.glob(".part-*"):
        try:
            if time.time() - part.stat().st_mtime < 1:
                continue  # it is perhaps just being locked
            with open(part / ".lock", "a") as file:  # it is the first that is made in a folder, and the first that goes
                _lock(file)
        except OSError:
            continue  # its process is alive
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def temporary_folder(folder):
    """Yield a new folder inside the Path `folder`: on the same disk, a file is moved to its place in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as name, locked(name):
        new = folder / Path(name).name / "new"  # relative like `folder`
        new.mkdir()
        yield new


@contextmanager
def replacing(path):
    """Yield a temporary path that takes the place of `path` when the block ends without an error.

    Whoever reads `path` finds the old file or the whole new one, never a half. A block that writes nothing changes
    nothing. The new file has the mode of the old one, and a link stays a link.

    Raises:
        InputError: there is something at `path` that is no file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {show_path(path)}: what is there is no file; give another name")
    path = path.resolve() if path.is_symlink() else path
    with temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        yield temporary
        if temporary.exists():
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------- data

FER2013_CLASS_COUNTS = {  # by Usage, in the order of EMOTIONS; Goodfellow et al. 2013, arXiv:1307.0414
    "Training": (3995, 436, 4097, 7215, 4830, 3171, 4965),
    "PublicTest": (467, 56, 496, 895, 653, 415, 607),
    "PrivateTest": (491, 55, 528, 879, 594, 416, 626),
}
# The files that can hold a split, best first. train.csv has no test rows, so training never has to open them.
# train.npz is cache/train.npz, the training rows in 53 MB, carried to another machine.
FER2013_SOURCES = {
    "train": ("train.csv", "icml_face_data.csv", "fer2013.csv", "fer2013.tar.gz", "train.npz"),
    "test": ("icml_face_data.csv", "fer2013.csv", "fer2013.tar.gz", "test_with_emotions.csv"),
}


def _parse_pixels(text, where):
    """Return the (2304,) uint8 pixels of one row; `where` names file and row for the error."""
    words = text.split()
    try:
        values = np.array(words, dtype=np.uint8)
    except (ValueError, OverflowError):
        bad = next(i for i, word in enumerate(words) if not (word.isdecimal() and len(word) < 4 and int(word) < 256))
        shown = shorten(words[bad])
        raise InputError(f"{where}: pixel {bad} is {shown!r}; expected whole numbers from 0 to 255") from None
    if len(values) != SIDE * SIDE:
        raise InputError(f"{where}: {len(values)} pixels; expected {SIDE * SIDE}, a {SIDE}x{SIDE} image")
    return values


def _open_tar(path):
    """Open a .tar.gz or .tar that has no more than MAX_BYTES; it is read to its end, where gzip keeps a checksum."""
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = gzip.open(raw) if packed else raw
        while file.read(1 << 20):
            if file.tell() > MAX_BYTES:
                raise InputError(f"{path} unpacks to more than {MAX_BYTES:,} bytes; FER2013 has less than 1 GB")
    return tarfile.open(path, "r:gz" if packed else "r:")


@contextmanager
def _open_csv(path):
    """Yield the open text of a CSV file, or of the only CSV inside a .tar.gz."""
    try:
        if path.name.endswith(".tar.gz"):
            with _open_tar(path) as archive:
                members = [member for member in archive if member.name.endswith(".csv") and member.isfile()]
                if len(members) != 1:
                    raise InputError(f"{path}: {len(members)} CSV files inside; expected one, fer2013.csv")
                yield io.TextIOWrapper(archive.extractfile(members[0]), encoding="utf-8-sig")
        else:
            if path.stat().st_size > MAX_BYTES:
                raise InputError(f"{path} has more than {MAX_BYTES:,} bytes; FER2013 has less than 1 GB")
            with open(path, newline="", encoding="utf-8-sig") as file:  # with or without a byte order mark
                yield file
    except Exception as error:  # a broken archive raises nearly anything
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno):
            raise
        raise InputError(f"{path} is broken ({shorten(error)}); download it again with `make data`") from None


def read_fer2013_csv(path):
    """Read one CSV file of FER2013, in any of the layouts in which it is handed round; blank lines are skipped.

    Args:
        path: train.csv (emotion,pixels), test.csv (pixels), test_with_emotions.csv (the same with emotions, sometimes
            with an index column), icml_face_data.csv (emotion, Usage, pixels), fer2013.csv (emotion,pixels,Usage) or
            fer2013.tar.gz with that inside.

    Returns:
        images (n, 48, 48) uint8, labels (n,) int64 or None, usage (n,) str or None.

    Raises:
        InputError: a row or the header is not as expected; the message names file, row and what was wrong.
    """
    path = Path(path)
    images, labels, usages = [], [], []
    with _open_csv(path) as file:
        reader = csv.reader(file)
        rows = (row for row in reader if any(cell.strip() for cell in row))  # without the blank lines
        header = [name.strip().lower() for name in next(rows, [])]
        if "pixels" not in header:
            raise InputError(f"{path}: its first line is {','.join(header)[:60]!r}; expected a column named pixels")
        columns = {name: header.index(name) for name in ("pixels", "emotion", "usage") if name in header}
        for row in rows:
            where = f"{path}, line {reader.line_num}"
            if len(row) != len(header):
                names = shorten(", ".join(header))
                raise InputError(f"{where}: {len(row)} columns; expected {len(header)} ({names})")
            images.append(_parse_pixels(row[columns["pixels"]], where))
            if "emotion" in columns:
                emotion = row[columns["emotion"]].strip()
                if emotion not in {"0", "1", "2", "3", "4", "5", "6"}:
                    raise InputError(f"{where}: the emotion is {shorten(emotion)!r}; expected 0 to 6")
                labels.append(int(emotion))
            if "usage" in columns:
                usage = row[columns["usage"]].strip()
                if usage not in FER2013_CLASS_COUNTS:
                    expected = ", ".join(FER2013_CLASS_COUNTS)
                    raise InputError(f"{where}: Usage is {shorten(usage)!r}; expected one of {expected}")
                usages.append(usage)
    if not images:
        raise InputError(f"{path}: no rows under the header; download it again with `make data`")
    return (
        np.stack(images).reshape(-1, SIDE, SIDE),
        np.array(labels) if labels else None,
        np.array(usages) if usages else None,
    )


def find_fer2013(split, folder):
    """Return the path of the best file in `folder` for "train" or "test", with labels; None if there is none."""
    return next((Path(folder, name) for name in FER2013_SOURCES[split] if Path(folder, name).is_file()), None)


def load_fer2013(split, folder=None):
    """Load a split of FER2013, from the cache in `folder`/cache after the first time.

    Args:
        split: "train" (28,709 images), "test" (7,178: "public_test", then "private_test"), or one of
            these two (3,589 each).
        folder: where the CSV files are; the project's data folder if None.

    Returns:
        images (n, 48, 48) uint8 and labels (n,) int64, the positions in EMOTIONS.

    Raises:
        InputError: no file there holds the split, or the file is broken.

    Source: Goodfellow et al., Challenges in Representation Learning, 2013, arXiv:1307.0414.
    """
    folder = Path(folder or DATA)
    usage_of_split = {"public_test": "PublicTest", "private_test": "PrivateTest"}
    side = "test" if split in usage_of_split else split
    if side not in FER2013_SOURCES:
        raise ValueError(f"split is {split!r}; expected train, test, public_test or private_test")
    source = find_fer2013(side, folder)
    if source is None:
        wanted = ", ".join(FER2013_SOURCES[side])
        raise InputError(f"no {side} set in {folder}; expected one of {wanted}; `make data` downloads it")
    images, labels, usages = _cached(source, folder / "cache" / f"{side}.npz", side)
    if split in usage_of_split:
        if usages[0] == "":
            raise InputError(f"{source} does not say which rows are {split}; icml_face_data.csv does (`make data`)")
        keep = usages == usage_of_split[split]
        images, labels = images[keep], labels[keep]
    return images, labels


def _cached(source, cache, side):
    """Return images, labels and usages of one side of FER2013, parsing `source` only when it has changed."""
    signature = f"{source.name} {source.stat().st_size} {source.stat().st_mtime_ns}"
    carried = source.suffix == ".npz"
    try:
        with np.load(source if carried else cache) as arrays:
            if sum(member.file_size for member in arrays.zip.infolist()) > MAX_BYTES:
                raise ValueError("it would fill the memory")
            if carried or str(arrays["signature"]) == signature:
                images = np.cumsum(arrays["differences"], axis=2, dtype=np.uint8)
                return images, arrays["labels"], arrays["usages"]
    except Exception:  # a damaged archive raises nearly anything
        if carried:
            raise InputError(f"{source} is broken; copy it again from data/cache, where the CSV files are") from None
        # There is none, or it is damaged: it is made anew.
    images, labels, usages = read_fer2013_csv(source)
    if labels is None:
        raise InputError(f"{source} has no emotion column; expected the labels of the {side} set (`make data`)")
    if usages is None:
        usages = np.full(len(images), "Training" if side == "train" else "")
    else:
        keep = np.flatnonzero((usages == "Training") == (side == "train"))
        keep = keep[np.argsort(usages[keep] == "PrivateTest", kind="stable")]  # PublicTest comes first
        images, labels, usages = images[keep], labels[keep], usages[keep]
    if not len(images):
        raise InputError(f"{source} has no rows of the {side} set; download it again with `make data`")
    # Neighbouring pixels differ little: their differences, modulo 256, take a fifth less room.
    arrays = {"differences": np.diff(images, axis=2, prepend=np.uint8(0)), "labels": labels, "usages": usages}
    try:
        with replacing(cache) as path:
            np.savez_compressed(path, **arrays, signature=signature)
    except OSError:
        pass  # a folder that cannot be written to, as Kaggle's input, goes without
    return images, labels, usages


def find_twins(images):
    """Return (n,) int64 group numbers, from 0: images that are equal in every pixel have the same.

    Args:
        images: (n, 48, 48) uint8.
    """
    return np.unique(images.reshape(len(images), -1), axis=0, return_inverse=True)[1].reshape(-1)


# What FER2013's 39 groups of twins whose labels disagree counted as when the networks that ship were trained, in the
# order of their pixels. Another choice would draw other validation faces.
TWIN_LABELS = [int(label) for label in "050126004455550444054654022406252425202"]


def split_validation(images, labels, fraction=0.1, seed=0):
    """Split off a stratified validation set, keeping exact twins on one side.

    FER2013 holds the same photograph several times. A twin on both sides would let the network score by memory. Which
    faces are drawn does not depend on the order of the rows, in which copies of FER2013 differ.

    Args:
        images: (n, 48, 48) uint8.
        labels: (n,) int.
        fraction: share of each class that goes to validation, 0 to 1; with the same seed a smaller share is a part of
            a larger one.
        seed: of the shuffle.

    Returns:
        train (k,) and validation (n - k,) int64: sorted positions in `images`.
    """
    group = find_twins(images)
    smallest, largest = (np.full(group.max(initial=-1) + 1, start) for start in (len(EMOTIONS), -1))
    np.minimum.at(smallest, group, labels)
    np.maximum.at(largest, group, labels)
    disagree = smallest != largest
    if disagree.sum() == len(TWIN_LABELS):
        smallest[disagree] = TWIN_LABELS
    rng = np.random.default_rng(seed)
    validation_groups = []
    for emotion in range(len(EMOTIONS)):
        groups = rng.permutation(np.flatnonzero(smallest == emotion))
        validation_groups.append(groups[: round(fraction * len(groups))])
    in_validation = np.isin(group, np.concatenate(validation_groups))
    return np.flatnonzero(~in_validation), np.flatnonzero(in_validation)


# --------------------------------------------------------------------------------------------------------- faces


@dataclass(frozen=True)
class Face:
    """A square around a face, framed as FER2013 frames its faces.

    x, y: the centre, in pixels of the frame; side: of the square, in pixels; score: the detector's, 0 to 1.
    """

    x: float
    y: float
    side: float
    score: float = 1.0

    @property
    def box(self):
        """Left, top, right and bottom as whole pixels; parts of it may lie outside the frame."""
        side = max(1, round(self.side))
        left, top = round(self.x - side / 2), round(self.y - side / 2)
        return left, top, left + side, top + side

    def overlap(self, other):
        """Return the area that two squares share, as a part of the area that they cover: 0 to 1."""
        width, height = (
            (self.side + other.side) / 2 - max(abs(a - b), abs(self.side - other.side) / 2)
            for a, b in ((self.x, other.x), (self.y, other.y))
        )
        shared = max(0, width) * max(0, height)
        return shared / (self.side**2 + other.side**2 - shared)


def to_bgr(frame):
    """Return `frame` as (h, w, 3) uint8 in OpenCV's order of colours.

    Args:
        frame: (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) uint8: grey, BGR or BGRA.

    Raises:
        InputError: it is something else.
    """
    shape = getattr(frame, "shape", None)
    if shape is None or frame.dtype != np.uint8 or len(shape) not in (2, 3) or 0 in shape:
        raise InputError(
            f"a frame is {getattr(frame, 'dtype', type(frame))} {shape}; expected uint8 (h, w[, channels])"
        )
    channels = 1 if len(shape) == 2 else shape[2]
    if channels == 3:
        return frame
    if channels not in (1, 4):
        raise InputError(f"a frame has {channels} channels; expected 1 (grey), 3 (BGR) or 4 (BGRA)")
    return cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR if channels == 1 else cv2.COLOR_BGRA2BGR)


def tell_of_haar():
    """Say on stderr that the Haar cascade stands in for YuNet, where YuNet is missing."""
    if not YUNET.is_file():
        print(
            "YuNet is missing (scripts/get_data.py --only-detector gets it): using OpenCV's Haar cascade.",
            file=sys.stderr,
        )


class FaceDetector:
    """Finds faces with OpenCV: with YuNet where its model file is there, else with a Haar cascade.

    How long a search takes grows with the pixels, and YuNet finds a face surely if it is 40 to 300 pixels high in the
    picture that is searched. So a frame is searched as pictures of several sizes, of which none is larger than it.

    Args:
        model: path of YuNet's ONNX file; YUNET if None. Where it is missing, the cascade is used.
        score: the smallest score of YuNet that counts as a face, 0 to 1.
        trusted: whether an unknown file is opened at once, see `_try_in_child`.

    Attributes:
        name: "YuNet" or "Haar".
        coarse, fine: longest side, in pixels, of a picture that is searched in no time, and of the largest picture
            that is worth its time.

    Sources: Wu et al. 2023, YuNet (doi 10.1007/s11633-023-1423-y); Viola and Jones 2001. The framing was measured on
    1,500 faces of FER2013: YuNet's box is as high as the tile, Haar's side is 0.96 of it, both centred.
    """

    HAAR_SIDE = 0.96  # of FER2013's tile
    SMALLEST, LARGEST = 40, 300  # pixels of a face in the picture that is searched
    SURE_SIDE, SURE_SCORE = 48, 0.8  # a face of fewer pixels needs a score of as much: gravel has some with 0.72

    def __init__(self, model=None, score=0.7, trusted=False):
        path = Path(model or YUNET)
        self.name = "YuNet" if path.is_file() else "Haar"
        if self.name == "YuNet":
            self.coarse, self.fine = 160, 1280
            self._file = np.fromfile(path, np.uint8)  # OpenCV cannot open every path on Windows
            create = functools.partial(cv2.FaceDetectorYN.create, "onnx", self._file, np.empty(0, np.uint8))
            # Four are kept: a change of size takes as long as a small search.
            self._network = functools.lru_cache(4)(lambda *size: create(size, score))
            try:
                if not (trusted or _is_known(self._file)):
                    _try_in_child("FaceDetector", path)
                with quiet_stderr():
                    self._detect_yunet(np.zeros((64, 64, 3), np.uint8))
            except Exception:  # OpenCV raises several kinds
                raise InputError(f"{path} is not YuNet's ONNX file; delete it and run `make data`") from None
        else:
            self.coarse, self.fine = 320, 640  # in a larger picture a cascade sees faces that are none
            self._haar = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml")

    def detect(self, frame, sizes=None):
        """Return the faces of a frame, the largest first.

        Args:
            frame: (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) uint8.
            sizes: longest sides, in pixels, of the pictures that are searched, rising. If None, two that show every
                face from 1/32 of the frame's longest side on.

        Returns:
            list of Face, in the coordinates of `frame`.
        """
        frame = to_bgr(frame)
        longest = max(frame.shape[:2])
        faces = []
        for size in sorted({min(size, longest) for size in sizes or (320, self.fine)}):
            for face in self._detect_at(frame, size):
                twin = next((other for other in faces if face.overlap(other) > 0.3), None)
                if twin is None:
                    faces.append(face)
                elif face.side * size / longest < self.LARGEST:  # else the smaller picture frames it better
                    faces[faces.index(twin)] = face
        return sorted(faces, key=lambda face: -face.side)

    def detect_around(self, frame, x, y, side):
        """Return the face nearest to a place of a frame, of about `side` pixels and found in no time, or None."""
        reach = max(1, round(2.25 * side))  # becomes 128 pixels, of which YuNet needs no padding
        left, top = (max(0, round(centre - reach / 2)) for centre in (x, y))
        part = frame[top : max(0, round(y + reach / 2)), left : max(0, round(x + reach / 2))]
        if not part.size:
            return None
        below, beside = (max(0, reach - length) for length in part.shape[:2])
        part = cv2.copyMakeBorder(part, 0, below, 0, beside, cv2.BORDER_REPLICATE)
        faces = [replace(face, x=face.x + left, y=face.y + top) for face in self.detect(part, [128])]
        return min(faces, key=lambda face: np.hypot(face.x - x, face.y - y), default=None)

    def _detect_at(self, frame, longest):
        """Return the faces of a (h, w, 3) uint8 frame, searched as a picture with that longest side in pixels.

        On pictures of less than 64 pixels YuNet returns, now and then, boxes of unset memory.
        """
        height, width = frame.shape[:2]
        scale = max(longest / max(height, width), min(640 / max(height, width), 64 / min(height, width)))
        if scale != 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        bottom, right = max(0, 64 - frame.shape[0]), max(0, 64 - frame.shape[1])
        if bottom or right:
            frame = cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        boxes = self._detect_yunet(frame) if self.name == "YuNet" else self._detect_haar(frame)
        faces = []
        for x, y, side, score in boxes / np.array([scale, scale, scale, 1]):
            inside = 0 <= x < width and 0 <= y < height and 1 <= side <= 2 * max(height, width)
            sure = score >= self.SURE_SCORE or side * scale >= self.SURE_SIDE
            if inside and sure:  # False, too, for what is not finite
                faces.append(Face(float(x), float(y), float(side), float(score)))
        return faces

    def _detect_yunet(self, frame):
        """Return (k, 4) float64: centre x, centre y, side and score of each face that is not lying on its side."""
        rows = self._network(frame.shape[1], frame.shape[0]).detect(frame)[1]
        if rows is None:
            return np.empty((0, 4))
        rows = rows.astype(np.float64)
        # Eyes (columns 4 to 7) and corners of the mouth (10 to 13). A face that is turned by more than 45 degrees, as
        # in a video that lacks its orientation, would get an emotion at random.
        right, down = ((rows[:, [10 + i, 12 + i]] - rows[:, [4 + i, 6 + i]]).mean(axis=1) for i in (0, 1))
        rows = rows[down > abs(right)]
        return np.column_stack([rows[:, 0] + rows[:, 2] / 2, rows[:, 1] + rows[:, 3] / 2, rows[:, 3], rows[:, 14]])

    def _detect_haar(self, frame):
        """The same, with a score of 1: a cascade knows no probabilities."""
        grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        rows = np.array(self._haar.detectMultiScale(grey, 1.1, 5, minSize=(32, 32)), dtype=np.float64).reshape(-1, 4)
        x, y, width = rows[:, 0], rows[:, 1], rows[:, 2]
        return np.column_stack([x + width / 2, y + width / 2, width / self.HAAR_SIDE, np.ones(len(rows))])


def crop_face(frame, face):
    """Cut a face out of a frame as FER2013 shows faces. Every caller gets its crops from here.

    What lies outside the frame is filled with the nearest pixels of its edge. The light is that of a usual face of
    FER2013, see `level_light`.

    Args:
        frame: (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) uint8.
        face: a Face in the frame's coordinates.

    Returns:
        (48, 48) uint8 grey.
    """
    height, width = frame.shape[:2]
    left, top, right, bottom = face.box
    part = to_bgr(frame[max(0, top) : max(0, bottom), max(0, left) : max(0, right)])
    grey = cv2.cvtColor(part, cv2.COLOR_BGR2GRAY)
    outside = max(0, -top), max(0, bottom - height), max(0, -left), max(0, right - width)
    if any(outside):
        grey = cv2.copyMakeBorder(grey, *outside, cv2.BORDER_REPLICATE)
    interpolation = cv2.INTER_AREA if grey.shape[0] > SIDE else cv2.INTER_LINEAR
    return level_light(cv2.resize(grey.astype(np.float32), (SIDE, SIDE), interpolation=interpolation))


def level_light(face, mean=129, spread=54, least=4):
    """Return a face with the brightness and contrast that are usual in FER2013.

    In little light the network says Angry of everybody. With this it reads validation faces at a quarter of their light
    as often right as in full light, at a tenth nearly so, and those in full light as often as without it.

    Args:
        face: (48, 48) float32 grey, 0 to 255.
        mean, spread: of the grey values of the result; those of FER2013's training faces.
        least: standard deviation from which on a face gets that spread; what has less is a wall, and stays flat.

    Returns:
        (48, 48) uint8 grey.
    """
    gain = spread / max(float(face.std()), least)
    return np.clip((face - face.mean()) * gain + mean, 0, 255).round().astype(np.uint8)


def move_face(face, shift, scale=1.0, degrees=0.0):
    """Return a (48, 48) uint8 face, turned left and scaled around its middle, and moved right and down by pixels."""
    matrix = cv2.getRotationMatrix2D(((SIDE - 1) / 2,) * 2, degrees, scale)
    matrix[:, 2] += shift
    return cv2.warpAffine(face, matrix, face.shape[::-1], borderMode=cv2.BORDER_REPLICATE)


def compress_face(face, quality):
    """Return a (48, 48) uint8 face as it comes out of a JPEG file of a quality from 0 to 100."""
    return cv2.imdecode(cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)


# -------------------------------------------------------------------------------------------------------- tracks


@dataclass(eq=False)
class Track:
    """A face followed through time: its id (from 1), the newest Face, when it was seen (s) and its velocity (px/s).

    What was made of it is there too: its probabilities, (7,), their weight, and when they were last blended (s).
    """

    id: int
    face: Face
    seen: float
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(2))
    probabilities: np.ndarray | float = 0.0
    weight: float = 0.0
    blended: float = -math.inf

    def blend(self, probabilities, seconds, time_constant):
        """Return the track's probabilities, averaged over time, so that one odd frame does not change the answer.

        A mean over all frames of the track in which one that is a time constant old counts 1/e of a new one (Eckner
        2012, "Algorithms for unevenly spaced time series"); the first frame counts no more than any other.

        Args:
            probabilities: (7,) of the newest frame.
            seconds: time of that frame.
            time_constant: in seconds; 0 for the newest frame alone.
        """
        fade = math.exp(-(seconds - self.blended) / time_constant) if time_constant else 0.0
        self.weight = fade * self.weight + 1
        self.probabilities = self.probabilities + (probabilities - self.probabilities) / self.weight
        self.blended = seconds
        return self.probabilities

    def expected_place(self, seconds):
        """Where the centre should be at `seconds`: straight on for half a second, then it waits."""
        return np.array([self.face.x, self.face.y]) + self.velocity * min(seconds - self.seen, 0.5)


class FaceTracker:
    """Gives each face an id that it keeps while it moves, is covered for a moment, or another face comes in.

    Faces are matched with the tracks by the distance to the predicted place and the ratio of the sides, nearest pair
    first. A track that is not matched waits for `memory` seconds, and then its id is gone for good.

    Attributes:
        tracks: list of Track, those of the newest frame and those that wait.
    """

    REACH = 0.8  # how far from its predicted place a face may be, in sides
    GROWTH = 1.6  # by which factor its side may have changed

    def __init__(self, memory=1.5):
        self.memory = memory
        self.tracks = []
        self._next_id = 1

    def update(self, faces, seconds):
        """Match the faces of a frame.

        Args:
            faces: list of Face.
            seconds: time of the frame; it must not fall.

        Returns:
            list of Track, one for each face, in the order of `faces`.
        """
        self.tracks = [track for track in self.tracks if seconds - track.seen <= self.memory]
        matched = self.match(faces, seconds)
        return [self._follow(matched.get(i), face, seconds) for i, face in enumerate(faces)]

    def match(self, faces, seconds):
        """Return a dict of the place in `faces` to the Track that goes on there, and change nothing."""
        pairs = []
        for i, face in enumerate(faces):
            for track in self.tracks:
                distance = np.hypot(*(track.expected_place(seconds) - (face.x, face.y))) / max(
                    face.side, track.face.side
                )
                growth = abs(np.log(face.side / track.face.side))
                if distance < self.REACH and growth < np.log(self.GROWTH):
                    pairs.append((distance + growth, i, track))
        matched = {}
        for _, i, track in sorted(pairs, key=lambda pair: pair[0]):
            if i not in matched and track not in matched.values():
                matched[i] = track
        return matched

    def _follow(self, track, face, seconds):
        """Move `track` to `face`, or begin a track there if it is None."""
        if track is None:
            track = Track(self._next_id, face, seconds)
            self._next_id += 1
            self.tracks.append(track)
        elif seconds > track.seen:
            moved = np.array([face.x - track.face.x, face.y - track.face.y]) / (seconds - track.seen)
            track.velocity = 0.7 * track.velocity + 0.3 * moved  # a detector's box trembles
            track.face, track.seen = face, seconds
        return track


class FaceFollower:
    """Finds and follows the faces of a stream, coarse to fine.

    In every frame a small picture is searched, and the surroundings of each followed face that is too small for it.
    A fine picture is searched every `interval` seconds, and at once when a face that was followed is missing. When is
    told by the time alone, so that a stream which is read from a later time on is soon searched like the whole one.

    Args:
        detector: FaceDetector.
        interval: longest time, in seconds, for which a face that only the fine picture shows is not found.
    """

    def __init__(self, detector, interval=0.5):
        self.detector = detector
        self.tracker = FaceTracker()
        self._followed, self._schedule = [], Schedule(1 / interval)

    def update(self, frame, seconds):
        """Return the list of Track in a frame, the largest face first; `seconds` is its time, and must not fall."""
        fine = self._schedule.is_due(seconds)
        if not fine:
            faces = self._look_again(frame, seconds)
            found = self.tracker.match(faces, seconds).values()
            fine = any(track not in found for track in self._followed)
        if fine:
            faces = self.detector.detect(frame, (self.detector.coarse, self.detector.fine))
        self._followed = self.tracker.update(faces, seconds)
        return self._followed

    def _look_again(self, frame, seconds):
        """Return the list of Face in a small picture of the frame, and around the followed faces, the largest first."""
        # While nobody is followed, a picture twice as large shows a newcomer sooner.
        coarse = self.detector.coarse * (1 if self._followed else 2)
        faces = self.detector.detect(frame, [coarse])
        for track in self._followed:
            if track.face.side * coarse / max(frame.shape[:2]) < self.detector.SMALLEST:
                near = self.detector.detect_around(frame, *track.expected_place(seconds), track.face.side)
                # Another face, at the edge of the surroundings, is cut by it.
                if near and self.tracker.match([near], seconds).get(0) is track:
                    faces = [near] + [face for face in faces if face.overlap(near) < 0.3]
        return sorted(faces, key=lambda face: -face.side)


# --------------------------------------------------------------------------------------------------------- video


def _quiet_opencv():
    """Keep OpenCV's and FFmpeg's own messages off stderr: the errors of this module say what matters."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


class Schedule:
    """Says when something that is done `rate` times a second is due; if that is 0, it always is."""

    def __init__(self, rate):
        self._rate, self._done = rate, -math.inf

    def is_due(self, seconds):
        """Return whether it is due at a time in seconds, and take it as done then."""
        tick = math.floor(seconds * self._rate + 1e-6)
        due = not self._rate or tick > self._done
        self._done = max(tick, self._done)
        return due


SCHEMES = "rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "rtp", "tcp", "srt"


class Video:
    """Frames of a camera, a file or a URL, each with its time.

    A file gives its frames with the file's own times. Where it is damaged, the frames after the damage are read too,
    and what is missing is told on stderr. One that ends more than a second before its own length raises an error after
    its last frame. A camera or a stream is read all the time by a thread of its own and gives
    the newest frame, with the time since it was opened, so that no answer is about an old frame. When it stops it is
    opened again, for `patience` seconds.

    Args:
        source: a camera number, a path, or an rtsp:// or http:// URL.
        patience: seconds to wait for a camera or stream that gives nothing.
        rate: frames a second that are given, the first of each interval; the others are not even decoded as far as
            that can be avoided. 0 for all.
        start: seconds of a file; earlier frames are not given.
        threads: that decode; 0 for as many as OpenCV likes.

    Attributes:
        fps: frames a second that the source has.
        length: seconds that the file says to have, which may be wrong; 0 if it says nothing.
        is_live: whether it is a camera or an endless stream.
        opened: time.time() of the first frame, by the clock as it is set now.

    Raises:
        InputError: it cannot be opened, has no frames, stays away, or breaks off.

    Example:
        for seconds, frame in Video("clip.mp4"): ...
    """

    def __init__(self, source, patience=5.0, rate=0.0, start=0.0, threads=0):
        _quiet_opencv()
        self.source, self.patience, self.rate = str(source), patience, rate
        if not os.path.exists(self.source):  # a file's name may end in a blank
            self.source = self.source.strip()
        self.start, self.threads = start, threads
        self.source = _without_scheme(self.source)
        self.is_camera = self.source.isdecimal() and len(self.source) < 6
        self.is_url = "://" in self.source
        if self.is_url:
            scheme, address = self.source.split("://", 1)
            if scheme.lower() not in SCHEMES:  # FFmpeg has some that read files
                raise InputError(f"{show_path(self.source)} is no {', '.join(SCHEMES)} address")
            self.source = f"{scheme.lower()}://{address}"  # FFmpeg knows no HTTP
        elif not self.is_camera:
            self.source = opencv_path(os.path.expanduser(self.source))
            self._check_file()
        began = time.monotonic()
        self._capture = self._open()
        ok, self._first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not ok:
            self._capture.release()
            raise InputError(self._unreadable(time.monotonic() - began))
        self.opened, self._began = time.time(), time.monotonic()
        self.fps = self._capture.get(cv2.CAP_PROP_FPS)
        if not 1 <= self.fps <= 240:
            self.fps = 25.0
        # An endless stream has no number of frames; a file behind a URL has one and is read as a file.
        self.is_live = self.is_camera or (self.is_url and self._capture.get(cv2.CAP_PROP_FRAME_COUNT) <= 0)
        self.length = max(0.0, self._capture.get(cv2.CAP_PROP_FRAME_COUNT) / self.fps)

    def _check_file(self):
        shown = show_path(self.source)
        try:
            if not Path(self.source).is_file():
                raise InputError(f"no video at {shown}: expected a camera number, a file, or an rtsp or http URL")
            open(self.source, "rb").close()
        except OSError as error:
            raise InputError(f"{shown} cannot be read: {error.strerror}; look at its permissions") from None

    def _open(self):
        if self.is_camera:
            return cv2.VideoCapture(int(self.source))
        limit = round(self.patience * 1000)
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
        if self.is_url:
            return cv2.VideoCapture(self.source, cv2.CAP_FFMPEG, timeouts)
        threads = [cv2.CAP_PROP_N_THREADS, self.threads] if self.threads else []
        path = os.path.join(os.curdir, self.source)  # "a:b.mp4" alone is a protocol
        return cv2.VideoCapture(path, cv2.CAP_FFMPEG, threads)

    def _unreadable(self, waited):
        if self.is_camera:
            return f"camera {self.source} gives no picture: is it plugged in, and not used by another program?"
        shown = show_path(self.source)
        if self.is_url:
            return f"{shown} gives no picture (waited {waited:.1f} s): is the address right, the stream on?"
        return f"{shown} is not a video that OpenCV can read: it may be cut short, or no .mp4 or .avi"

    def __iter__(self):
        """Yield (seconds, frame), once: float, from 0 and rising, and (h, w, 3) uint8 BGR."""
        if self._first is None:
            raise RuntimeError(f"{show_path(self.source)} was read before; open it again with another Video")
        first, self._first = self._first, None
        return self._newest(first) if self.is_live else self._every(first)

    def _seek(self):
        """Go to a frame before `start`, and grab it.

        Of some files OpenCV finds a later frame than it was asked for. The time that it tells then is true, and it is
        asked for an earlier one.
        """
        early = 1.0
        while early < self.start:
            self._capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * (self.start - early))
            if self._capture.grab() and 0 < self._capture.get(cv2.CAP_PROP_POS_MSEC) <= 1000 * self.start:
                return
            early *= 4
        self._capture.release()
        self._capture = self._open()
        self._capture.grab()

    def _every(self, frame):
        schedule, seconds, lost, ends_early = Schedule(self.rate), -1 / self.fps, 0.0, False
        if self.start:
            self._seek()
            frame = None
        try:
            for failed in self._grabs():
                position = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                before = seconds
                # Some containers carry no times; then the frame rate has to do.
                seconds = max(position, 0.0) if position > seconds else seconds + 1 / self.fps
                if failed:  # and the times go on as if there had been nothing, in some containers
                    lost += max(failed / self.fps, seconds - before - 1 / self.fps)
                if seconds > self.start - 1e-6 and schedule.is_due(seconds):
                    frame = self._capture.retrieve()[1] if frame is None else frame
                    if frame is not None:
                        yield seconds, frame
                frame = None
            rate = self._capture.get(cv2.CAP_PROP_FPS) or math.inf
            missing = (self._capture.get(cv2.CAP_PROP_FRAME_COUNT) - 1) / rate - seconds
            ends_early = missing > 1 and not self._has_whole_boxes()
            if missing > 1 and not ends_early:
                print(
                    f"{show_path(self.source)} ends {missing:.1f} s before its own length: it is damaged there, or was "
                    "cut without encoding",
                    file=sys.stderr,
                )
        finally:
            self._capture.release()
            if lost and not ends_early:
                shown = show_path(self.source)
                print(f"{shown} is damaged: {lost:.1f} s of it cannot be read and were skipped", file=sys.stderr)

        if ends_early:
            shown, length = show_path(self.source), seconds + missing
            raise InputError(f"{shown} breaks off at {seconds:.1f} s of {length:.1f} s: copy or download it again")

    def _has_whole_boxes(self):
        """Whether this is an .mp4 or .mov file that ends where the last of its boxes does.

        Such a file may have fewer frames than it counts, since programs that cut without encoding only mark the first
        ones as not to be shown. In other containers whole files were at most 0.1 s shorter than they say.
        """
        if self.is_url:
            return False
        try:
            size, place = os.path.getsize(self.source), 0
            with open(self.source, "rb") as file:
                while place < size:
                    file.seek(place)
                    head = file.read(16)
                    if not (place or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")):
                        return False
                    length = int.from_bytes(head[:4])
                    length = int.from_bytes(head[8:]) if length == 1 else length or size
                    place += max(8, length)
        except OSError:  # its disk has gone away
            return False
        return place == size

    def _grabs(self):
        """Grab frame after frame, the first of which was read before; yield how many failed before each.

        A frame that cannot be read is not the end while, with it, there are fewer than the file says to hold.
        """
        count, failed, since = self._capture.get(cv2.CAP_PROP_FRAME_COUNT), 0, time.monotonic()
        tried = 1 + (self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 * self.fps if self.start else 0)
        yield 0
        while True:
            tried += 1
            if self._capture.grab():
                yield failed
                failed, since = 0, time.monotonic()
            else:
                failed += 1
                if tried > count or time.monotonic() - since > self.patience:
                    return

    def _newest(self, frame):
        schedule, start, news = Schedule(self.rate), self._began, threading.Condition()
        state = {"frame": frame, "at": start, "stop": False}
        schedule.is_due(0.0)
        patience = self.patience + (1 / self.rate if self.rate else 0)

        def read():
            while not state["stop"]:
                if not self._capture.grab():
                    time.sleep(0.25)
                    self._capture.release()
                    self._capture = self._open()
                    continue
                at = time.monotonic()
                ok, frame = self._capture.retrieve() if schedule.is_due(at - start) else (False, None)
                if ok:
                    with news:
                        state.update(frame=frame, at=at)
                        news.notify()
            self._capture.release()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while True:
                with news:
                    if not news.wait_for(lambda: state["frame"] is not None, patience):
                        raise InputError(f"the stream stopped, and {self._unreadable(patience)}")
                    frame, at, state["frame"] = state["frame"], state["at"], None
                opened = time.time() - (time.monotonic() - start)
                if abs(opened - self.opened) > 1:  # the clock was set, or the machine slept
                    self.opened = opened
                yield at - start, frame
        finally:
            state["stop"] = True
            reader.join(1.0)


# -------------------------------------------------------------------------------------------------------- models


def import_keras():
    """Import Keras and return it, with the settings that this project needs whatever ~/.keras/keras.json says.

    Raises:
        InputError: the backend that the environment or that file asks for is not there.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # does not reach all of TensorFlow's talk at its start
    try:
        with quiet_stderr():
            import keras
    except (ImportError, ValueError) as error:
        cause = error
        while cause := cause.__cause__ or cause.__context__:
            if isinstance(cause, KeyboardInterrupt):  # Ctrl-C, of which a C library has made an ImportError
                raise KeyboardInterrupt from None
        there = [name for name in ("keras", "tensorflow", "jax", "torch") if importlib.util.find_spec(name)]
        raise InputError(
            f"Keras does not start ({shorten(error)}): KERAS_BACKEND or ~/.keras/keras.json has to name a backend that "
            f"is installed; of Keras and its backends there are {', '.join(there) or 'none'}"
        ) from None
    if keras.backend.backend() == "tensorflow":
        import tensorflow

        with quiet_stderr():
            tensorflow.config.list_physical_devices()  # where there is a driver and no GPU, it complains of that once
        tensorflow.get_logger().setLevel("ERROR")  # it warns of each new shape, and a network here sees many
    keras.config.set_image_data_format("channels_last")
    return keras


def known_hashes():
    """Return the SHA-256 of the model files that this project has made or checked, as a set of hexadecimal numbers."""
    sums = MODEL.with_name("SHA256SUMS")
    return {YUNET_SHA256, *(sums.read_text().split()[::2] if sums.is_file() else [])}


def _is_known(content):
    return hashlib.sha256(content).hexdigest() in known_hashes()


def _try_in_child(kind, path):
    """Open a model file in another process first: on some damaged files OpenCV crashes the process that it is in.

    Args:
        kind: name of the class that opens it, here.
        path: of the file.

    Raises:
        RuntimeError, subprocess.TimeoutExpired: that process crashed, or hangs.
    """
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import utils\n"
        "try: getattr(utils, sys.argv[2])(sys.argv[3], trusted=True)\n"
        "except utils.InputError: pass"
    )
    command = [sys.executable, "-P", "-c", code, ROOT, kind, path]  # -P: nothing is imported from the current folder
    if subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=120).returncode:
        raise RuntimeError(f"a process that opens {path} crashes")


def _check_probabilities(probabilities, name):
    """Raise InputError unless every row of (n, 7) adds up to 1: after a training that diverged they are NaN."""
    sums = probabilities.sum(axis=1)
    right = np.abs(sums - 1) < 1e-3
    if not right.all():
        raise InputError(
            f"{name} answers with probabilities that add up to {sums[~right][0]:.3g}; expected 1: train it anew"
        )


def _probe_faces():
    """Return (2, 48, 48) uint8, black and noise, of which every model must make something."""
    return np.stack([np.zeros((SIDE, SIDE)), np.random.default_rng(0).integers(0, 256, (SIDE, SIDE))]).astype(np.uint8)


def _tflite_input_shape(content):
    """Return the input shape in a .tflite file's bytes: OpenCV does not tell it, and takes other sizes without a word.

    The steps are those of its schema: Model.subgraphs[0].inputs[0] is an index into tensors, and each has a shape
    (https://github.com/tensorflow/tensorflow/blob/v2.21.0/tensorflow/compiler/mlir/lite/schema/schema.fbs).
    """

    def follow(position):
        return position + struct.unpack_from("<I", content, position)[0]

    def table_field(table, number):
        vtable = table - struct.unpack_from("<i", content, table)[0]
        return follow(table + struct.unpack_from("<H", content, vtable + 4 + 2 * number)[0])

    def numbers(vector):
        return struct.unpack_from(f"<{struct.unpack_from('<I', content, vector)[0]}i", content, vector + 4)

    subgraph = follow(table_field(follow(0), 2) + 4)
    tensor = follow(table_field(subgraph, 0) + 4 + 4 * numbers(table_field(subgraph, 1))[0])
    return numbers(table_field(tensor, 0))


def _trainer(path):
    """Return the script that writes the model at `path`."""
    return f"scripts/{'train_pretrained' if path.stem == PRE_TRAINED_MODEL.stem else 'train'}.py"


class EmotionNet:
    """The CNN in OpenCV's dnn: seven probabilities for each face, without TensorFlow.

    Args:
        path: a .tflite file; MODEL's if None.
        trusted: whether an unknown file is opened at once, see `_try_in_child`.

    Raises:
        InputError: the file is missing, broken, or not a model of 48x48 grey faces and seven emotions.
    """

    def __init__(self, path=None, trusted=False):
        path = Path(path or MODEL.with_suffix(".tflite"))
        if not path.is_file():
            raise InputError(f"no model at {path}: expected a .tflite file; {_trainer(path)} writes one")
        content = np.fromfile(path, np.uint8)
        try:
            if not (trusted or _is_known(content)):
                _try_in_child("EmotionNet", path)
            with quiet_stderr():
                self._net = cv2.dnn.readNetFromTFLite(content)
                size = _tflite_input_shape(content)[1:]
                answers = self.predict(_probe_faces()) if size == (SIDE, SIDE, 1) else None
        except Exception:  # a damaged file raises nearly anything
            raise InputError(f"{path} is not a whole .tflite model; {_trainer(path)} writes one") from None
        if answers is None:
            raise InputError(f"{path} takes {'x'.join(map(str, size))}; expected {SIDE}x{SIDE}x1, grey faces")
        if answers.shape[1] != len(EMOTIONS):
            count = answers.shape[1]
            raise InputError(f"{path} gives {count} values for a face; expected {len(EMOTIONS)}, one an emotion")
        _check_probabilities(answers, path)

    def predict(self, faces):
        """Return (n, 7) float32 probabilities, in the order of EMOTIONS, for (n, 48, 48) uint8 grey faces."""
        if not len(faces):
            return np.empty((0, len(EMOTIONS)), np.float32)
        outputs = []
        for face in faces:  # the file's batch size is 1
            self._net.setInput(cv2.dnn.blobFromImage(face))
            outputs.append(self._net.forward().reshape(-1))
        return np.stack(outputs)


def _check_pickle(content):
    """Raise pickle.UnpicklingError if a pickle has other or more opcodes than that of a Keras model, which has 40."""
    needed = (
        "PROTO FRAME MEMOIZE BINGET SHORT_BINUNICODE STACK_GLOBAL NONE BININT BININT1 BININT2 LONG1 BINBYTES BINBYTES8 "
        "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 NEWOBJ REDUCE BUILD STOP"
    ).split()
    for number, (opcode, _, _) in enumerate(pickletools.genops(content), 1):
        if opcode.name not in needed or number > 100:
            raise pickle.UnpicklingError(f"its opcode {number} is {opcode.name}, which no Keras model needs")


class _ModelUnpickler(pickle.Unpickler):
    """Unpickles a Keras 3 model and nothing else.

    A pickle names the functions to call. That of a Keras model names three: getattr(<model class>, "_unpickle_model")
    and io.BytesIO for the archive. The first two get stand-ins here, so that no function of the pickle's choice runs.
    """

    class _ModelClass:
        pass

    def find_class(self, module, name):
        if (module, name) in (("_io", "BytesIO"), ("io", "BytesIO")):
            return io.BytesIO
        if (module, name) == ("builtins", "getattr"):
            return self._getattr
        if module.startswith("keras.src.models.") and name in ("Functional", "Sequential", "Model"):
            return self._ModelClass
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which no Keras model needs")

    @classmethod
    def _getattr(cls, owner, name):
        if owner is not cls._ModelClass or name != "_unpickle_model":
            raise pickle.UnpicklingError(f"it wants the attribute {name}, which no Keras model needs")
        return cls._load

    @staticmethod
    def _load(archive):
        from keras.src.saving import saving_lib  # what Keras' own unpickling calls, but there with safe_mode=False

        with zipfile.ZipFile(archive) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > MAX_BYTES:
            raise pickle.UnpicklingError(f"it unpacks to {size:,} bytes; expected less than {MAX_BYTES:,}")
        archive.seek(0)
        return saving_lib.load_model(archive, compile=False, safe_mode=True)


def load_model(path=None):
    """Load a pickled Keras model of this project, without running any code that a pickle may carry.

    Args:
        path: a .pkl file; MODEL if None.

    Returns:
        keras.Model: (n, 48, 48, 1) float32 raw grey, 0 to 255, to (n, 7) softmax in the order of EMOTIONS.

    Raises:
        InputError: the file is missing, broken, holds something else, or is a model for another input or output.
    """
    path = Path(path or MODEL)
    if not path.is_file():
        raise InputError(f"no model at {path}: expected a .pkl file; {_trainer(path)} writes one")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES:,} bytes; expected a pickled Keras model of this project")
    content = path.read_bytes()
    try:
        _check_pickle(content)
        keras = import_keras()
        model = _ModelUnpickler(io.BytesIO(content)).load()
    except InputError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        reason = f"{type(error).__name__}: {shorten(error, 120)}"
        raise InputError(f"{path} is not a whole pickled Keras model: {reason}") from None
    if not isinstance(model, keras.Model):
        raise InputError(f"{path} holds a {type(model).__name__}; expected a pickled Keras model")
    shapes = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    expected = (None, SIDE, SIDE, 1), (None, len(EMOTIONS))
    if shapes != expected:
        shown = " to ".join(shorten(shape, 40) for shape in shapes)
        raise InputError(f"{path} maps {shown}; expected {expected[0]} to {expected[1]}")
    answers = model(_probe_faces()[..., None].astype(np.float32), training=False)
    _check_probabilities(keras.ops.convert_to_numpy(answers), path)
    return model


def save_model(model, path):
    """Save a model as a pickle at `path` and, for OpenCV's dnn, as .tflite beside it.

    SHA256SUMS, beside them too, gets the hash of the .tflite file: those of MODEL's folder are opened without ado.

    Raises:
        InputError: the model answers with NaN; nothing is saved.
        RuntimeError: OpenCV reads the model as another function than Keras has; nothing is saved.
    """
    path = Path(path)
    faces = np.random.default_rng(0).integers(0, 256, (4, *model.input_shape[1:3])).astype(np.uint8)
    expected = model.predict(faces[..., None].astype(np.float32), verbose=0)
    _check_probabilities(expected, path)
    with replacing(path) as pickled, replacing(path.with_suffix(".tflite")) as exported:
        pickled.write_bytes(pickle.dumps(model))
        with redirect_stdout(io.StringIO()):
            model.export(exported, format="litert", verbose=False)
        # OpenCV's reader knows a part of the format; 4.14 drops the bias of a dense layer, for one, without a word.
        difference = np.abs(EmotionNet(exported, trusted=True).predict(faces) - expected).max()
        if not difference <= 1e-4:  # NaN, too
            raise RuntimeError(
                f"OpenCV's probabilities differ by {difference:.2g} from Keras': build it of other layers"
            )
    _record_hash(path.with_suffix(".tflite"))


def _record_hash(path):
    """Write the hash of a file into SHA256SUMS beside it, as `sha256sum` does."""
    sums = path.with_name("SHA256SUMS")
    lines = sums.read_text().splitlines() if sums.is_file() else []
    lines = [line for line in lines if line.split()[1:] != [path.name]]
    lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    with replacing(sums) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in sorted(lines)))


def grad_cam(model, faces, classes):
    """Return what in faces spoke for an emotion (Selvaraju et al. 2017, arXiv:1610.02391).

    Where a network only averages and adds up after its feature maps, as those of this project do, the gradient of
    Grad-CAM is the weight of the last layer, "emotion", and the map that of Zhou et al. 2016 (arXiv:1512.04150).

    Args:
        model: as `load_model` returns it.
        faces: (n, 48, 48) uint8 grey.
        classes: (n,) int, places in EMOTIONS.

    Returns:
        (n, 48, 48) float32, 0 to 1.
    """
    keras = import_keras()
    if not len(faces):
        return np.empty((0, SIDE, SIDE), np.float32)
    weights = model.get_layer("emotion").get_weights()[0][0, 0]  # (channels, 7)
    pooling = next(layer for layer in model.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D))
    features = keras.Model(model.input, pooling.input).predict(faces[..., None].astype(np.float32), verbose=0)
    maps = np.maximum(np.einsum("nhwc,cn->nhw", features, weights[:, classes]), 0)
    maps /= np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-9)
    return np.stack([cv2.resize(m, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).clip(0, 1) for m in maps])


def reliability(probabilities, labels, bins=15):
    """Compare how sure a classifier is with how often it is right. Source: Guo et al. 2017, arXiv:1706.04599.

    Args:
        probabilities: (n, 7) float, each row a softmax.
        labels: (n,) int.
        bins: number of equal intervals between 0 and 1.

    Returns:
        For each bin, as (bins,) arrays: mean probability of the predicted class, share of right predictions, and
        number of predictions. A bin without predictions has 0 in all of them.
    """
    confidence, hits = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    safe = np.maximum(count, 1)
    return np.bincount(place, confidence, bins) / safe, np.bincount(place, hits, bins) / safe, count


def calibration_error(probabilities, labels, bins=15):
    """Return the expected calibration error, 0 to 1: the gap in `reliability`, averaged over all predictions."""
    confidence, accuracy, count = reliability(probabilities, labels, bins)
    return float((np.abs(confidence - accuracy) * count).sum() / count.sum())


# -------------------------------------------------------------------------------------------------------- stream

CLEARLY_LARGER = 1.25  # by this factor a face is, so that the answer is about it from now on


def put_first(tracks, answered):
    """Move the answered track to the front of a list of Track, unless the largest one is clearly larger."""
    stays = [track for track in tracks if track.id == answered]
    if not stays or tracks[0].face.side > CLEARLY_LARGER * stays[0].face.side:
        return tracks
    return stays + [track for track in tracks if track.id != answered]


def analyse(video, detector, net, smoothing=0.5, rate=10.0):
    """Follow the faces of a video and classify them.

    Args:
        video: iterable of (seconds, frame), such as Video.
        detector: FaceDetector.
        net: EmotionNet.
        smoothing: time constant in seconds of the average over the frames of a face; 0 for single frames.
        rate: frames a second that are analysed; 0 for every frame.

    Yields:
        seconds, frame, and for each face its id, its Face and its (7,) probabilities. The face that is answered
        for comes first, then the largest. Frames between those that are analysed have the faces of the last one.
    """
    follower, schedule, faces, answered = FaceFollower(detector), Schedule(rate), [], None
    for seconds, frame in video:
        frame = to_bgr(frame)
        if schedule.is_due(seconds):
            tracks = put_first(follower.update(frame, seconds), answered)
            waiting = {track.id for track in follower.tracker.tracks} - {track.id for track in tracks}
            if tracks and answered not in waiting:
                answered = tracks[0].id
            probabilities = net.predict([crop_face(frame, track.face) for track in tracks])
            pairs = zip(tracks, probabilities, strict=True)
            faces = [(track.id, track.face, track.blend(p, seconds, smoothing)) for track, p in pairs]
        yield seconds, frame, faces


# ------------------------------------------------------------------------------------------------------ pictures


@contextmanager
def quiet_stderr():
    """Drop what C libraries write to stderr: some print mere warnings there and have no setting against it."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _check_pixels(content, path):
    """Raise InputError if a picture file says to hold more pixels than Pillow allows: a small file can fill the memory.

    Args:
        content: (n,) uint8, the file's bytes.
        path: of the file, for the message.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns at half as many
            Image.open(io.BytesIO(content)).close()
    except Image.DecompressionBombError as error:
        raise InputError(f"no picture at {path}: {shorten(error, 120)}") from None
    except Exception:
        pass  # a kind that Pillow does not know; OpenCV has a bound of its own


def read_picture(path):
    """Read a picture file as a viewer shows it: upright, white where it is transparent, the first one of several.

    Args:
        path: of a file that OpenCV can read: JPEG (CMYK too), PNG, WebP, TIFF, BMP, GIF and others, grey or in colour,
            of 8 or 16 bits.

    Returns:
        (h, w, 3) uint8 BGR.

    Raises:
        InputError: there is no file, no whole picture in it, or a picture of more than 179 million pixels.
    """
    if not Path(path).is_file():
        raise InputError(f"no picture at {path}: there is no such file")
    content = np.fromfile(path, np.uint8)  # OpenCV opens no path that is not UTF-8
    _check_pixels(content, path)
    try:
        with quiet_stderr():
            raw, kinds, metadata = cv2.imdecodeWithMetadata(content, flags=cv2.IMREAD_UNCHANGED)
            if raw is not None and raw.shape[2:] == (4,) and raw.dtype.kind == "u":
                white, on_white = np.iinfo(raw.dtype).max, raw[..., :3].copy()
                for top in range(0, len(raw), 64):  # in strips, since float32 takes four times the memory
                    strip, opaque = on_white[top : top + 64], raw[top : top + 64, :, 3:] / np.float32(white)
                    strip[:] = white - (white - strip) * opaque
                content = cv2.imencodeWithMetadata(".png", on_white, kinds, metadata)[1]
            picture = cv2.imdecode(content, cv2.IMREAD_COLOR)  # in 8 bits, and turned as the EXIF data say
    except cv2.error:  # an empty file, or more pixels than OpenCV allows
        picture = None
    if picture is None:
        raise InputError(
            f"no picture at {path}: OpenCV cannot read the file; expected a whole JPEG, PNG, WebP or TIFF picture"
        )
    return picture


@functools.cache
def _detector_and_net():
    """Return the FaceDetector and the EmotionNet of `read_emotions`, made once."""
    return FaceDetector(), EmotionNet()


def read_emotions(image, detector=None, net=None):
    """Find the faces in a picture and read their emotions.

    Args:
        image: path of a picture, or (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) uint8: grey, BGR or BGRA. One of 48x48
            pixels is taken for a face that was cut out already, as those of FER2013 are.
        detector: FaceDetector; made at the first call if None. Two threads need two.
        net: EmotionNet; likewise.

    Returns:
        list of (Face, (7,) float32 probabilities in the order of EMOTIONS), the largest face first.

    Raises:
        InputError: there is no picture at the path, or `image` is something else.

    Example:
        for face, probabilities in read_emotions("me.jpg"): ...
    """
    frame = to_bgr(read_picture(image) if isinstance(image, (str, os.PathLike)) else image)
    detector, net = detector or _detector_and_net()[0], net or _detector_and_net()[1]
    if frame.shape[:2] == (SIDE, SIDE):
        faces, crops = [Face(SIDE / 2, SIDE / 2, SIDE)], [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)]
    else:
        faces = detector.detect(frame)
        crops = [crop_face(frame, face) for face in faces]
    return list(zip(faces, net.predict(crops), strict=True))


UNSURE = 0.3  # probability below which no emotion is named: such an answer expects to be wrong in over 7 of 10 cases


def name_emotion(probabilities):
    """Return the most probable emotion of (7,) probabilities, or "unsure", and its probability."""
    best = int(np.argmax(probabilities))
    return EMOTIONS[best] if probabilities[best] >= UNSURE else "unsure", probabilities[best]


INK, ACCENT, GROOVE = (235, 235, 235), (80, 200, 120), (70, 70, 70)  # BGR
FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_faces(frame, faces, height=480):
    """Return a picture of a frame and its faces, `height` pixels high: boxes, ids, emotions and the panel of bars.

    Args:
        frame: (h, w, 3) uint8 BGR.
        faces: for each face its id, its Face and its (7,) probabilities, largest first.
        height: in pixels; letters, lines and the panel grow with it.

    Returns:
        (height, width, 3) uint8 BGR; the width is even, as video encoders want it, and of the frame at most 8/3 of the
        height.
    """
    unit = height / 480
    scale = min(height / frame.shape[0], 8 / 3 * height / frame.shape[1])
    size = max(2, round(frame.shape[1] * scale / 2) * 2), max(1, round(frame.shape[0] * scale))
    picture = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    picture = cv2.copyMakeBorder(picture, 0, height - size[1], 0, 0, cv2.BORDER_CONSTANT)
    thin, margin, letters = max(1, round(unit)), round(4 * unit), 0.6 * unit
    for i, (number, face, probabilities) in enumerate(faces):
        left, top, right, bottom = (round(edge * scale) for edge in face.box)
        colour = ACCENT if i == 0 else INK
        emotion, sure = name_emotion(probabilities)
        cv2.rectangle(picture, (left, top), (right, bottom), colour, 2 * thin, cv2.LINE_AA)
        label = f"#{number} {emotion} {sure:.0%}"
        (label_width, label_height), _ = cv2.getTextSize(label, FONT, letters, thin)
        label_width, label_height = label_width + 2 * margin, label_height + 3 * margin
        x, y = min(max(left, 0), max(0, size[0] - label_width)), max(top, label_height)
        cv2.rectangle(picture, (x, y - label_height), (x + label_width, y), colour, cv2.FILLED)
        place = x + margin, y - round(7 * unit)
        cv2.putText(picture, label, place, FONT, letters, (20, 20, 20), thin, cv2.LINE_AA)
    return np.hstack([picture, draw_panel(faces, height)])


def draw_panel(faces, height):
    """Return the panel with a bar for each of the seven emotions of the first face: (height, width, 3) uint8 BGR.

    It is 230 pixels wide where it is 480 pixels high; see `draw_faces`.
    """
    unit = height / 480
    thin, width, left = max(1, round(unit)), 2 * round(115 * unit), round(15 * unit)
    panel = np.full((height, width, 3), 30, np.uint8)

    def write(text, x, y, letters, colour):
        cv2.putText(panel, text, (x, y), FONT, letters * unit, colour, thin, cv2.LINE_AA)

    write(f"face {faces[0][0]}" if faces else "no face", left, round(35 * unit), 0.6, INK)
    probabilities = faces[0][2] if faces else np.zeros(len(EMOTIONS))
    for i, (emotion, probability) in enumerate(zip(EMOTIONS, probabilities, strict=True)):
        y = round(75 * unit) + i * round(height - 90 * unit) // len(EMOTIONS)
        colour = ACCENT if faces and i == int(np.argmax(probabilities)) else INK
        write(emotion, left, y, 0.5, colour)
        write(f"{probability:4.0%}", width - round(60 * unit), y, 0.5, colour)
        top, bottom, length = y + round(8 * unit), y + round(18 * unit), (width - 2 * left) * float(probability)
        cv2.rectangle(panel, (left, top), (width - left, bottom), GROOVE, cv2.FILLED)
        cv2.rectangle(panel, (left, top), (left + round(length), bottom), colour, cv2.FILLED)
    return panel


# ------------------------------------------------------------------------------------- plots, pages and progress


def fill_in(text, name, content):
    """Return a page's markdown with `content` between its comments "<!-- name: ... -->" and "<!-- end of name -->"."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)"
    filled, count = re.subn(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise InputError(f"the page has {count} places for {name}; expected <!-- {name}: ... --> and its end, once")
    return filled


class _Line:
    """A file for tqdm whose one line is replaced in the notebook, so that a page keeps only what it says in the end."""

    encoding = "utf-8"

    def __init__(self):
        from IPython.display import display

        self._shown = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text):
        if text.strip():
            self._shown.update({"text/plain": text.strip()}, raw=True)

    def flush(self):
        pass


def progress(steps=None, words="", total=None, **options):
    """Return `steps` with a bar that says how far they are, in a notebook and on a terminal, as a tqdm object.

    Args:
        steps: iterable; None for a bar that is moved with `update()`.
        words: what is being done.
        total: number of steps, where `steps` has no length.
        options: others of tqdm.
    """
    from tqdm import tqdm

    ipython = sys.modules.get("IPython")
    in_notebook = hasattr(ipython and ipython.get_ipython(), "kernel")
    shown = in_notebook or sys.stderr.isatty()
    options |= {"desc": words, "total": total, "disable": not shown}
    return tqdm(steps, file=_Line() if in_notebook else sys.stderr, **options)


def show_fig(figure, words):
    """Show a matplotlib figure in a notebook, with words for those who cannot see it, which become its alt text."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": words}})
    plt.close(figure)


def save_fig(figure, path):
    """Save a matplotlib figure as a PNG that reads well on a web page."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", facecolor="white")
