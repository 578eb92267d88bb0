# Generated from notebooks/07_live_stream.ipynb by `make scripts`: edit the notebook, not this file.
"""Reads a webcam, a video file or a network stream, follows the faces in it, and prints the emotion of the largest one
every second.
"""

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

import csv
import math
import shutil
import subprocess
import time
from collections import deque
from contextlib import ExitStack, closing
from datetime import datetime, timedelta

import cv2

import utils


def open_video(source, rate=0.0):
    """Open `source`; without one, the webcam, or the bundled clip where there is no webcam."""
    if source:
        return utils.Video(source, rate=rate)
    try:
        return utils.Video("0", rate=rate)
    except utils.InputError as error:
        print(f"No webcam ({error}); playing the bundled clip instead.", file=sys.stderr)
        return utils.Video(utils.CLIP, rate=rate)


def format_time(moment, live, every):
    """Return hh:mm:ss of a time in seconds: of the clock for live sources, else since the start of the file.

    With hundredths if answers come more often than once a second.
    """
    moment = datetime.fromtimestamp(moment) if live else datetime.min + timedelta(seconds=moment)
    hundredths = f".{moment.microsecond // 10_000:02}" if every < 1 else ""
    return f"{moment:%H:%M:%S}{hundredths}"


def format_answer(moment, faces, all_faces):
    """Return the lines for one moment: the emotion of the first face or, one line each, of all with their ids."""
    if not faces:
        return f"{moment}s : no face"
    lines = []
    for number, _, probabilities in faces if all_faces else faces[:1]:
        who = f"face {number} : " if all_faces else ""
        emotion, sure = utils.name_emotion(probabilities)
        lines.append(f"{moment}s : {who}{emotion} , {sure:.0%}")
    return "\n".join(lines)


class AnswerLog:
    """A CSV file with one row for each face of each answer, written as the answers come."""

    def __init__(self, path):
        self._file = open(path, "w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(["seconds", "track", "left", "top", "right", "bottom", *utils.EMOTIONS])

    def write(self, seconds, faces):
        for number, face, probabilities in faces:
            self._rows.writerow([f"{seconds:.3f}", number, *face.box, *(f"{p:.4f}" for p in probabilities)])
        self._file.flush()

    def close(self):
        self._file.close()


LONGEST = 10.0  # seconds from one picture to the next; a longer gap is shortened


class Window:
    """A window on the screen. A recorded video is slowed down to its own time while it is shown."""

    TITLE = "emotions (q to quit)"

    def __init__(self, live):
        # Without a screen Qt, in which OpenCV opens its windows, ends the whole process; so another one tries first.
        # -P: it does not import a cv2.py of the folder in which the user is.
        probe = [sys.executable, "-P", "-c", "import cv2; cv2.namedWindow('probe')"]
        if subprocess.run(probe, capture_output=True).returncode:
            raise utils.InputError("--show needs a screen and there is none; --record out.mp4 writes the same pictures")
        self._live, self._start = live, None
        cv2.namedWindow(self.TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)

    def show(self, picture, seconds):
        """Show a picture at its time; return False once the user has closed the window, or pressed q or Esc."""
        if self._start is None:
            self._start = time.monotonic() - seconds
            cv2.resizeWindow(self.TITLE, picture.shape[1], picture.shape[0])
        cv2.imshow(self.TITLE, picture)
        early = 0 if self._live else seconds - (time.monotonic() - self._start)
        self._start -= max(0, early - LONGEST)
        key = cv2.waitKey(max(1, round(min(early, LONGEST) * 1000))) & 0xFF
        return key not in (ord("q"), 27) and cv2.getWindowProperty(self.TITLE, cv2.WND_PROP_VISIBLE) >= 1

    def close(self):
        cv2.destroyAllWindows()


def fit(picture, width, height):
    """Return a (h, w, 3) uint8 picture as (height, width, 3), scaled as a whole, with black beside or below it."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(picture, 0, height - size[1], 0, width - size[0], cv2.BORDER_CONSTANT)


class Recorder:
    """Writes pictures to an .mp4 file at `fps`, repeating or leaving out some where a camera is not that regular.

    Pictures of another size than the first one, as when a telephone is turned, are fitted to it.
    """

    ROOM = 2 << 20  # bytes that stay free on the disk, for the end of the file

    def __init__(self, path, fps):
        self._path, self._name, self._fps = utils.opencv_path(path), utils.show_path(Path(path).name), fps
        self._writer, self._count = None, 0
        self._clock, self._last = 0.0, 0.0

    def write(self, picture, seconds):
        if shutil.disk_usage(Path(self._path).parent).free < self.ROOM:
            raise utils.InputError(f"no room left on the disk for {self._name}")
        if self._writer is None:
            self._size = picture.shape[1], picture.shape[0]
            self._writer = cv2.VideoWriter(self._path, cv2.VideoWriter.fourcc(*"mp4v"), self._fps, self._size)
            if not self._writer.isOpened():
                raise utils.InputError(
                    f"cannot write a video to {self._name}; expected a folder that can be written to"
                )
        if (picture.shape[1], picture.shape[0]) != self._size:
            picture = fit(picture, *self._size)
        self._clock += min(seconds - self._last, LONGEST)
        self._last = seconds
        while self._count <= self._clock * self._fps + 0.5:
            self._writer.write(picture)
            self._count += 1

    def close(self):
        if self._writer is None:
            return
        self._writer.release()
        video = cv2.VideoCapture(self._path)  # on a full disk the writer says nothing
        video.set(cv2.CAP_PROP_POS_FRAMES, self._count - 1)
        frames = video.get(cv2.CAP_PROP_FRAME_COUNT)
        # Ctrl-C may have come between the writing of a picture and its counting.
        if frames not in (self._count, self._count + 1) or not video.grab():
            raise utils.InputError(
                f"{self._name} cannot be played to its end, and is dropped: is there room on the disk?"
            )


def run(video, every, rate, smoothing, all_faces, show, record, log, net):
    """Answer every `every` seconds of `video`; the other arguments are those of the script, and `net` its EmotionNet.

    Returns:
        answers, the last 1,000 as a deque of (seconds, faces as `utils.analyse` yields them), and a line that sums up.

    Raises:
        utils.InputError: the source stopped or breaks off, there is no screen for the window, or a file cannot be
            written, or is being written by another process.
    """
    detector = utils.FaceDetector()  # first, since it may fail, and an older log or recording must outlive that
    answers, frames, seconds, due, failure = deque(maxlen=1000), 0, 0.0, utils.Schedule(1 / every), None
    opened = video.opened if video.is_live else 0.0  # answers of a camera are due, and told, by the clock
    with ExitStack() as stack:
        for path in [Path(name) for name in (record, log) if name]:
            stack.enter_context(utils.locked(path.parent, path.name))
        window = stack.enter_context(closing(Window(video.is_live))) if show else None
        table = stack.enter_context(closing(AnswerLog(log))) if log else None
        target = stack.enter_context(utils.replacing(record)) if record else None
        fps = round(video.fps, 3 if video.fps < 65 else 2)  # what MPEG-4 counts in is no finer than 1/65535 s
        recorder = stack.enter_context(closing(Recorder(target, fps))) if record else None
        utils.tell_of_haar()
        try:
            for seconds, frame, faces in utils.analyse(video, detector, net, smoothing, rate):
                frames += 1
                picture = utils.draw_faces(frame, faces) if show or record else None
                if recorder:
                    recorder.write(picture, seconds)
                if video.is_live and video.opened != opened:  # the clock was set, perhaps back
                    opened, due = video.opened, utils.Schedule(1 / every)
                if due.is_due(opened + seconds):
                    answers.append((seconds, faces))
                    moment = format_time(opened + seconds, video.is_live, every)
                    print(f"Preprocessing ...\n{format_answer(moment, faces, all_faces)}\n", flush=True)
                    if table:
                        table.write(seconds, faces)
                if window and not window.show(picture, seconds):
                    break
        except KeyboardInterrupt:
            pass  # the usual end of a camera
        except Exception as error:
            failure = error  # is raised after the recording was closed and kept
    if failure:
        raise failure
    return answers, f"{seconds:.0f} s of video in {frames} frames, an answer every {every:g} s"


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source",
        type=str,
        default="",
        help="camera number, video file, or rtsp or http URL; empty for the webcam, else the bundled clip",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=1.0,
        help="seconds of the stream from one answer to the next (default: %(default)s)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=10.0,
        help="frames a second that are searched for faces and classified; 0 for every frame (default: %(default)s)",
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        default=0.5,
        help="time constant in seconds of the average over a face's frames; 0 for single frames (default: %(default)s)",
    )
    parser.add_argument(
        "--all-faces",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="answer for every face, not only for the largest (default: %(default)s)",
    )
    parser.add_argument(
        "--show",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="open a window with box, id, emotion and a bar for each of the seven; q closes it (default: %(default)s)",
    )
    parser.add_argument("--record", type=str, default="", help="write what the window shows to this .mp4 file")
    parser.add_argument(
        "--log",
        type=str,
        default="",
        help="write time, track, box and the seven probabilities of every answer to this .csv file",
    )
    parser.add_argument(
        "--model", type=str, default="", help="a .tflite model; empty for results/model/my_own_model.tflite"
    )
    return parser.parse_args(argv)


def main(
    source: str,
    every: float,
    rate: float,
    smoothing: float,
    all_faces: bool,
    show: bool,
    record: str,
    log: str,
    model: str,
):
    for name, value, least in (("every", every, 1e-3), ("rate", rate, 0), ("smoothing", smoothing, 0)):
        if not least <= value < math.inf:
            expected = "seconds, more than 0" if name == "every" else "0 or more"
            raise utils.InputError(f"--{name} is {value}; expected {expected}")
    for name, suffix in ((record, ".mp4"), (log, ".csv")):
        if name:
            utils.check_output(name, suffix, [source, model, utils.CLIP, utils.MODEL.with_suffix(".tflite")])
    rate = max(rate, 1 / every) if rate else 0.0
    net = utils.EmotionNet(model or None)
    video = open_video(source, 0.0 if show or record else rate)
    print("Reading video stream ...\n", flush=True)
    answers, summary = run(video, every, rate, smoothing, all_faces, show, record, log, net)
    print(summary, file=sys.stderr)


if __name__ == "__main__":
    utils.run_script(main, parse_args)
