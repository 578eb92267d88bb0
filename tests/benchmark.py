"""How fast the live stream is, and how much memory it takes, on one core: `make bench`.

The whole way of a frame is timed: it is decoded, searched, cropped and classified, with one face in 640x480. The first
answer is timed from the start of the process, as a user waits for it. Prints a line for each figure and its target.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

MEGABYTE = 1e6


def pin_to_one_core():
    """Let this process and its children run on one core only, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def memory():
    """Return the resident memory of this process in bytes; its peak where the system tells no more."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_to_first_answer(clip):
    """Return the seconds from the start of the script to its first emotion on stdout."""
    command = [sys.executable, ROOT / "scripts" / "predict_live_stream.py", "--source", clip]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if "%" in line:
                elapsed = time.perf_counter() - began
                process.kill()
                return elapsed
    raise RuntimeError("the script ended without an answer")


def frames_with_one_face(clip, detector, count=100):
    """Return the first `count` frames of the clip in which one face is found, kept as JPEG to be decoded again."""
    import cv2

    import utils

    frames = []
    for _, frame in utils.Video(clip):
        if len(detector.detect(frame)) == 1:
            frames.append(cv2.imencode(".jpg", frame)[1])
        if len(frames) == count:
            break
    return frames


def measure(frame_count):
    """Run `frame_count` frames through the live stream's pipeline; return the figures by name."""
    import cv2
    from predict_live_stream import analyse

    import utils

    cv2.setNumThreads(1)
    detector, net = utils.FaceDetector(), utils.EmotionNet()
    frames = frames_with_one_face(utils.CLIP, detector)
    laps, used = [], []

    def stream():
        for i in range(frame_count):
            began = time.perf_counter()
            yield i / 25, cv2.imdecode(frames[i % len(frames)], cv2.IMREAD_COLOR)
            laps.append(time.perf_counter() - began)
            used.append(memory())

    for _ in analyse(stream(), detector, net):
        pass
    image = cv2.imdecode(frames[0], cv2.IMREAD_COLOR)
    crop = utils.crop_face(image, detector.detect(image)[0])[None]
    alone = []
    for _ in range(500):
        began = time.perf_counter()
        net.predict(crop)
        alone.append(time.perf_counter() - began)
    early, late = used[min(500, frame_count // 10)], max(used[-frame_count // 10 :])
    return {
        "detector": detector.name,
        "median ms a face": 1000 * float(np.median(alone)),
        "median ms a frame": 1000 * float(np.median(laps)),
        "95 % ms a frame": 1000 * float(np.quantile(laps, 0.95)),
        "peak memory MB": max(used) / MEGABYTE,
        "memory growth MB": (late - early) / MEGABYTE,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000, help="length of the stream (default: %(default)s)")
    parser.add_argument("--output", default="", help="write the figures to this .json file, too")
    arguments = parser.parse_args()
    pin_to_one_core()
    import utils

    first = [seconds_to_first_answer(utils.CLIP) for _ in range(5)]
    figures = {"first answer s": float(np.median(first))} | measure(arguments.frames)
    targets = {
        "first answer s": 1.5,
        "median ms a face": 15,
        "median ms a frame": 25,
        "peak memory MB": 350,
        "memory growth MB": 10,
    }
    for name, value in figures.items():
        target = f"  (target: under {targets[name]:g})" if name in targets else ""
        print(f"{name:<20} {value:>8.2f}{target}" if isinstance(value, float) else f"{name:<20} {value:>8}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures | {"frames": arguments.frames}, indent=2) + "\n")
    sys.exit(any(figures[name] >= target for name, target in targets.items()))


if __name__ == "__main__":
    main()
