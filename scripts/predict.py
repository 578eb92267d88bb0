# Generated from notebooks/05_evaluation.ipynb by `make scripts`: edit the notebook, not this file.
"""Measures the accuracy of a saved model on the test rows of FER2013, or reads the emotions in your own pictures."""

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

import glob
import os
from collections import Counter
from contextlib import nullcontext

import cv2
import numpy as np

import utils

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".avif", ".heic"}


def find_pictures(text):
    """Return the paths of the pictures that `text`, a path or a pattern, stands for; itself if there are none."""
    name = os.path.expanduser(text)
    if os.path.isdir(name):
        inside = sorted(path for path in Path(name).iterdir() if path.suffix.lower() in PICTURES)
        return [path for path in inside if not path.name.startswith(".")] or [Path(name)]
    matches = [] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
    return [path for match in matches for path in find_pictures(match)] or [Path(name)]


def name_outputs(paths, folder):
    """Return a path in `folder` for each picture: me_emotions.png for me.jpg, and me_emotions_2.png for another me.

    Raises:
        utils.InputError: `folder` is or looks like a file, or one of the paths in it is a picture of `paths`.
    """
    folder, outputs, count = utils.output_folder(folder, ""), [], Counter()
    if folder.suffix.lower() in PICTURES:
        raise utils.InputError(f"--output is {folder}; expected a folder")
    inputs = {(file.st_dev, file.st_ino) for file in (path.stat() for path in paths if path.exists())}
    for path in paths:
        count[path.stem.lower()] += 1  # some disks know no capital letters
        number = count[path.stem.lower()]
        output = folder / f"{path.stem}_emotions{f'_{number}' if number > 1 else ''}.png"
        if output.exists() and (output.stat().st_dev, output.stat().st_ino) in inputs:
            raise utils.InputError(f"--output would replace {output}, one of the pictures; name another folder")
        outputs.append(output)
    return outputs


def format_faces(name, faces):
    """Return the lines for a picture: for each of `faces`, (number, utils.Face, probabilities), its emotion."""
    lines = [] if faces else [f"{name} : no face"]
    for number, _, probabilities in faces:
        who = f"face {number} : " if len(faces) > 1 else ""
        emotion, sure = utils.name_emotion(probabilities)
        lines.append(f"{name} : {who}{emotion} , {sure:.0%}")
    return "\n".join(lines)


def tell_emotions(paths, output, model):
    """Print the emotion of every face in pictures; the arguments are those of the script, and `paths` its `image`.

    Raises:
        utils.InputError: some of the pictures cannot be read, which all others were before; or see `name_outputs`.
    """
    pictures = list(dict.fromkeys(picture for path in paths for picture in find_pictures(str(path))))
    outputs = name_outputs(pictures, output) if output else [None] * len(pictures)
    net = utils.EmotionNet(f"{os.path.splitext(model)[0]}.tflite" if model else None)
    detector, failures = utils.FaceDetector(), {}
    utils.tell_of_haar()
    with utils.locked(output) if output else nullcontext():
        for path, target in zip(pictures, outputs, strict=True):
            try:
                if path.is_dir():
                    suffixes = ", ".join(sorted(PICTURES))
                    raise utils.InputError(f"no picture in {path}: expected files that end in {suffixes}")
                picture = utils.read_picture(path)
            except (utils.InputError, OSError) as error:
                failures[str(path)] = str(error)
                continue
            pairs = utils.read_emotions(picture, detector, net)
            faces = [(number, *pair) for number, pair in enumerate(pairs, 1)]
            print(format_faces(utils.printable(path), faces), flush=True)
            if target:
                height = min(max(480, picture.shape[0]), 1080)  # as screens are high
                drawn = utils.draw_faces(picture, faces, height)
                with utils.replacing(target) as temporary:
                    temporary.write_bytes(cv2.imencode(".png", drawn)[1].tobytes())  # tofile can miss a full disk
    if failures:
        names, reason = utils.shorten(", ".join(failures), 120), next(iter(failures.values()))
        several = f"{len(failures)} of {len(pictures)} pictures cannot be read ({names}): " if len(failures) > 1 else ""
        raise utils.InputError(several + reason)


def predict(network, images):
    """Return what a keras.Model says of (n, 48, 48) uint8 faces, (n, 7) float32, with a bar for those who wait."""
    starts = utils.progress(range(0, len(images), 256), "reading faces")
    batches = (images[start : start + 256, ..., None].astype(np.float32) for start in starts)
    return np.concatenate([network.predict_on_batch(batch) for batch in batches])


def bootstrap_interval(statistic, *columns, draws=1000):
    """Return the 95 % interval of a statistic: percentiles of bootstrap draws, as two floats.

    Args:
        statistic: takes arrays like `columns` and returns a number.
        columns: arrays of the same length n, drawn together; the draws are the same in every call with that n.
    """
    rng = np.random.default_rng(0)
    count = len(columns[0])
    values = []
    for _ in range(draws):
        chosen = rng.integers(0, count, count)
        values.append(statistic(*(column[chosen] for column in columns)))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def describe(name, hits):
    """Return one line with the share of `hits`, (n,) bool, and its interval."""
    if not len(hits):
        return f"{name:<12} no images"
    low, high = bootstrap_interval(np.mean, hits)
    return f"{name:<12} {hits.mean():6.1%}  ({low:.1%} to {high:.1%})  {hits.sum():,} of {len(hits):,}"


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        help='pictures, folders or patterns such as "*.jpg", whose emotions are told; without any, the accuracy',
    )
    parser.add_argument(
        "--output",
        type=str,
        default="",
        help="folder to which each picture is written with boxes and bars; empty for none",
    )
    parser.add_argument(
        "--model", type=str, default="", help="a pickled Keras model; empty for results/model/my_own_model.pkl"
    )
    parser.add_argument("--data", type=str, default="", help="folder with FER2013; empty for data")
    parser.add_argument(
        "--verbose",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also print PublicTest, PrivateTest and each emotion, with 95 %% intervals (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(image: list, output: str, model: str, data: str, verbose: bool):
    if output and not image:
        raise utils.InputError("--output is for the pictures of --image; name some")
    if image:
        tell_emotions(image, output, model)
        sys.exit()  # the rest is about the test set, which needs TensorFlow

    images, labels = utils.load_fer2013("test", data or None)
    network = utils.load_model(model or None)
    probabilities = predict(network, images)
    hits = probabilities.argmax(axis=1) == labels
    print(f"Accuracy on test set: {hits.mean():.0%}")

    if verbose:
        print(describe("test set", hits))
        try:
            public = len(utils.load_fer2013("public_test", data or None)[1])  # the first rows of the test set
        except utils.InputError as error:
            print(error)
        else:
            print(describe("PublicTest", hits[:public]))
            print(describe("PrivateTest", hits[public:]))
        for label, emotion in enumerate(utils.EMOTIONS):
            print(describe(emotion, hits[labels == label]))


if __name__ == "__main__":
    utils.run_script(main, parse_args)
