# Generated from notebooks/07_live_stream.ipynb by `make scripts`: edit the notebook, not this file.
"""Reads a webcam, a video file or a network stream, follows the faces in it, and prints the emotion of the largest one
every second.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import csv
import math
import subprocess
import time
from collections import deque
from contextlib import ExitStack, closing
from datetime import datetime, timedelta

import cv2
import numpy as np

import utils


def open_video(source):
    """Open `source`; without one, the webcam, or the bundled clip where there is no webcam."""
    if source:
        return utils.Video(source)
    try:
        return utils.Video("0")
    except utils.InputError as error:
        print(f"No webcam ({error}); playing the bundled clip instead.", file=sys.stderr)
        return utils.Video(utils.CLIP)


def analyse(video, detector, net, smoothing=0.5):
    """Follow the faces of a video and classify them in every frame.

    Args:
        video: iterable of (seconds, frame), such as utils.Video.
        detector: utils.FaceDetector.
        net: utils.EmotionNet.
        smoothing: time constant in seconds of the average over the frames of a face; 0 for single frames.

    Yields:
        seconds, frame, and for each face, largest first: its id, its utils.Face and its (7,) probabilities.
    """
    tracker = utils.FaceTracker()
    for seconds, frame in video:
        frame = utils.to_bgr(frame)
        tracks = tracker.update(detector.detect(frame), seconds)
        probabilities = net.predict([utils.crop_face(frame, track.face) for track in tracks])
        pairs = zip(tracks, probabilities, strict=True)
        yield seconds, frame, [(track.id, track.face, track.blend(p, seconds, smoothing)) for track, p in pairs]


def format_time(seconds, live, every):
    """Return hh:mm:ss, by the clock for live sources; with hundredths if answers come more often than once a second."""
    moment = datetime.now() if live else datetime.min + timedelta(seconds=seconds)
    hundredths = f".{moment.microsecond // 10_000:02}" if every < 1 else ""
    return f"{moment:%H:%M:%S}{hundredths}"


def format_answer(moment, faces, all_faces):
    """Return the lines for one moment: the emotion of the largest face or, one line each, of all with their ids."""
    if not faces:
        return f"{moment}s : no face"
    lines = []
    for number, _, probabilities in faces if all_faces else faces[:1]:
        who = f"face {number} : " if all_faces else ""
        best = int(np.argmax(probabilities))
        lines.append(f"{moment}s : {who}{utils.EMOTIONS[best]} , {probabilities[best]:.0%}")
    return "\n".join(lines)


class AnswerLog:
    """A CSV file with one row for each face of each answer, written as the answers come."""

    def __init__(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(["seconds", "track", "left", "top", "right", "bottom", *utils.EMOTIONS])

    def write(self, seconds, faces):
        for number, face, probabilities in faces:
            self._rows.writerow([f"{seconds:.3f}", number, *face.box, *(f"{p:.4f}" for p in probabilities)])
        self._file.flush()

    def close(self):
        self._file.close()


draw = utils.draw_faces  # photographs are drawn the same way


class Window:
    """A window on the screen. A recorded video is slowed down to its own time while it is shown."""

    TITLE = "emotions (q to quit)"

    def __init__(self, live):
        # Without a screen Qt, in which OpenCV opens its windows, ends the whole process; so another one tries first.
        probe = [sys.executable, "-c", "import cv2; cv2.namedWindow('probe')"]
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
        key = cv2.waitKey(max(1, round(early * 1000))) & 0xFF
        return key not in (ord("q"), 27) and cv2.getWindowProperty(self.TITLE, cv2.WND_PROP_VISIBLE) >= 1

    def close(self):
        cv2.destroyAllWindows()


class Recorder:
    """Writes pictures to an .mp4 file at `fps`, repeating or leaving out some where a camera is not that regular."""

    def __init__(self, path, fps):
        self._path, self._fps, self._writer, self._count = str(path), fps, None, 0

    def write(self, picture, seconds):
        if self._writer is None:
            size = picture.shape[1], picture.shape[0]
            self._writer = cv2.VideoWriter(self._path, cv2.VideoWriter.fourcc(*"mp4v"), self._fps, size)
            if not self._writer.isOpened():
                raise utils.InputError(
                    f"cannot write a video to {self._path}; expected a folder that can be written to"
                )
        while self._count <= seconds * self._fps + 0.5:
            self._writer.write(picture)
            self._count += 1

    def close(self):
        if self._writer is not None:
            self._writer.release()


def run(video, every, smoothing, all_faces, show, record, log, net):
    """Answer every `every` seconds of `video`; the other arguments are those of the script, and `net` its EmotionNet.

    Returns:
        answers, the last 1,000 as a deque of (seconds, faces as `analyse` yields them), and a line that sums up.

    Raises:
        utils.InputError: the source stopped, there is no screen for the window, or a file cannot be written.
    """
    detector = utils.FaceDetector()  # first, since it may fail, and an older log or recording must outlive that
    answers, frames, seconds, due, failure = deque(maxlen=1000), 0, 0.0, 0, None
    with ExitStack() as stack:
        window = stack.enter_context(closing(Window(video.is_live))) if show else None
        target = stack.enter_context(utils.replacing(record)) if record else None
        recorder = stack.enter_context(closing(Recorder(target, video.fps))) if record else None
        table = stack.enter_context(closing(AnswerLog(log))) if log else None
        if detector.name == "Haar":
            print("YuNet's model file is missing (`make data` gets it); using OpenCV's Haar cascade.", file=sys.stderr)
        try:
            for seconds, frame, faces in analyse(video, detector, net, smoothing):
                frames += 1
                if seconds >= due * every - 1e-6:
                    due = math.floor(seconds / every + 1e-6) + 1
                    answers.append((seconds, faces))
                    moment = format_time(seconds, video.is_live, every)
                    print(f"Preprocessing ...\n{format_answer(moment, faces, all_faces)}\n", flush=True)
                    if table:
                        table.write(seconds, faces)
                picture = draw(frame, faces) if show or record else None
                if recorder:
                    recorder.write(picture, seconds)
                if window and not window.show(picture, seconds):
                    break
        except KeyboardInterrupt:
            pass  # the usual end of a camera
        except utils.InputError as error:
            failure = error  # after the recording was closed and kept
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


def main(source: str, every: float, smoothing: float, all_faces: bool, show: bool, record: str, log: str, model: str):
    if not 0 < every < math.inf:
        raise utils.InputError(f"--every is {every}; expected seconds, more than 0")
    if not 0 <= smoothing < math.inf:
        raise utils.InputError(f"--smoothing is {smoothing}; expected seconds, 0 or more")
    if record and (Path(record).suffix.lower() != ".mp4" or Path(record).is_dir()):
        raise utils.InputError(f"--record is {record}; expected the name of a file that ends in .mp4")
    net = utils.EmotionNet(model or None)
    video = open_video(str(source))
    print("Reading video stream ...\n", flush=True)
    answers, summary = run(video, every, smoothing, all_faces, show, record, log, net)
    print(summary, file=sys.stderr)


if __name__ == "__main__":
    utils.run_script(main, parse_args)
