# Generated from notebooks/06_preprocessing_test.ipynb by `make scripts`: edit the notebook, not this file.
"""Turns 20 s of video into 20 or 21 grey images of 48x48 pixels, one a second, each with a face in its middle."""

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

import shutil

import cv2
import numpy as np

import utils

SECONDS = 20  # of the video that count
FEWEST = 20  # images that make a set; with the first and the last second there are 21
BORROW = 2.0  # seconds a second without a face may borrow from
WHOLE = 0.95  # share of a face's square that must lie in the frame


def share_inside(face, frame):
    """Return which share of a face's square lies in the frame, 0 to 1."""
    left, top, right, bottom = face.box
    width = min(right, frame.shape[1]) - max(left, 0)
    height = min(bottom, frame.shape[0]) - max(top, 0)
    return max(0, width) * max(0, height) / (right - left) ** 2


def collect_crops(video, detector):
    """Crop the largest whole face of every frame in the first SECONDS of a video.

    Args:
        video: utils.Video.
        detector: utils.FaceDetector.

    Returns:
        times (n,) float64 of the faces in seconds, crops (n, 48, 48) uint8, the time at which the video ended, and the
        error with which it did so, or None.
    """
    times, crops, seconds, failure = [], [], 0.0, None
    try:
        for seconds, frame in utils.progress(video, "looking for faces"):
            faces = [face for face in detector.detect(frame) if share_inside(face, frame) >= WHOLE]
            if faces:
                times.append(seconds)
                crops.append(utils.crop_face(frame, faces[0]))
            if seconds >= SECONDS + BORROW:
                break
    except utils.InputError as error:
        failure = error  # it breaks off, and what came before counts
    return np.array(times), np.array(crops), seconds + 1 / video.fps, failure


def choose_seconds(times, end):
    """Choose the crop for each full second from 0 to SECONDS that the video reaches.

    Args:
        times: (n,) float64, rising: when a face was seen.
        end: when the video ended, in seconds.

    Returns:
        list of (second, position in `times`) for the seconds that have a face within BORROW.
    """
    if not len(times):
        return []
    reached = range(min(SECONDS, int(end)) + 1)
    nearest = [(second, int(np.abs(times - second).argmin())) for second in reached]
    return [(second, i) for second, i in nearest if abs(times[i] - second) <= BORROW]


def older_images(folder):
    """Return the paths of the images in a folder that a set would replace."""
    return [path for i in range(SECONDS + 1) if (path := folder / f"image{i}.png").exists()]


def write_images(crops, folder):
    """Write image0.png, image1.png, ... in place of an older set; an error puts the older set back."""
    with utils.locked(folder), utils.temporary_folder(folder) as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        old.mkdir()
        for i, crop in enumerate(crops):
            (new / f"image{i}.png").write_bytes(cv2.imencode(".png", crop)[1].tobytes())
        before = older_images(folder)
        for path in before:
            shutil.copy2(path, old)
        written = []
        try:
            for path in list(new.iterdir()):
                written.append(path.replace(folder / path.name))
            for path in set(before) - set(written):
                path.unlink()
        except BaseException:
            for path in written:
                path.unlink()
            for path in old.iterdir():
                path.replace(folder / path.name)
            raise


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source",
        type=str,
        default="",
        help="camera number, video file, or rtsp or http URL; empty for the bundled clip",
    )
    parser.add_argument(
        "--output", type=str, default="", help="folder for the images; empty for results/preprocessing_test"
    )
    return parser.parse_args(argv)


def main(source: str, output: str):
    folder = utils.output_folder(output, utils.RESULTS / "preprocessing_test")
    utils.remove_leftovers(folder)
    for path in older_images(folder):
        utils.check_output(path, ".png", [source])
        old = np.fromfile(path, np.uint8)
        picture = cv2.imdecode(old, cv2.IMREAD_UNCHANGED) if old.size else None
        if picture is not None and picture.shape != (utils.SIDE, utils.SIDE):
            raise utils.InputError(f"{utils.show_path(path)} is a picture of yours: give another --output")
    video = utils.Video(source or utils.CLIP)
    detector = utils.FaceDetector()
    print(f"Reading {utils.show_path(video.source)}, looking for faces with {detector.name} ...", flush=True)
    times, crops, end, failure = collect_crops(video, detector)
    chosen = choose_seconds(times, end)
    if len(chosen) < FEWEST:
        raise failure or utils.InputError(
            f"{utils.show_path(video.source)} shows a face in {len(chosen)} of its seconds; expected {FEWEST}: "
            "take a video of 20 s or more in which one face is seen"
        )
    for i, (second, position) in enumerate(chosen):
        away = abs(times[position] - second)
        note = f" (no whole face at {second} s: taken from {times[position]:.2f} s)" if away > 1.5 / video.fps else ""
        print(f"image{i}.png: {times[position]:.2f} s{note}")
    faces = crops[[position for _, position in chosen]]
    write_images(faces, folder)
    print(f"{len(faces)} images of {utils.SIDE}x{utils.SIDE} pixels are in {utils.show_path(folder)}")
    if failure:
        raise failure


if __name__ == "__main__":
    utils.run_script(main, parse_args)
