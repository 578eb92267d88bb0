"""Whether the live stream can run for hours: memory, threads, descriptors, pace, and a camera that goes: `make soak`.

The frames of the bundled clip, decoded again and again, are analysed and drawn as `--show` does. Then a camera in the
network breaks off and comes back. Prints a line for each figure and its limit; a figure over its limit fails.
"""

import argparse
import json
import os
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402 (its folder is on sys.path from here on)
from tests.benchmark import MEGABYTE, Camera, memory, pin_to_one_core, serve  # noqa: E402

LIMITS = {  # figure: the most that is no failure
    "memory growth MB": 10,
    "threads more": 0,
    "descriptors more": 0,
    "time of the last fifth, beside the first": 1.1,
    "camera: memory growth MB": 10,
    "camera: threads more": 0,
    "camera: descriptors more": 0,
}


def count_handles():
    """Return how many threads this process has, those of C libraries too, and how many descriptors are open.

    Where the system does not tell, only Python's threads are counted.
    """
    if not os.path.isdir("/proc/self/task"):
        return np.array([threading.active_count(), 0])
    return np.array([len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))])


def play(clip, laps):
    """Yield (seconds, frame) of a video, opened and decoded anew in each of `laps`, with times that go on."""
    start = 0.0
    for _ in range(laps):
        video = utils.Video(clip)
        for seconds, frame in video:
            yield start + seconds, frame
        start += seconds + 1 / video.fps


def soak_file(clip, detector, net, frame_count, settled=1000):
    """Analyse and draw `frame_count` frames or a little more, whole laps of a clip; return figures by name.

    Args:
        clip: path of a video.
        detector, net: utils.FaceDetector and utils.EmotionNet.
        frame_count: int.
        settled: frames after which memory, threads and descriptors are first counted, also in whole laps.
    """
    length = sum(1 for _ in utils.Video(clip))
    settled = -(-settled // length)
    laps = max(-(-frame_count // length), settled + 1)
    # Filled before the first frame: lists that grow with every frame would be memory that the stream does not take.
    used, spent, handles = np.ones(laps * length), np.ones(laps * length), []
    for i, (_, frame, faces) in enumerate(utils.analyse(play(clip, laps), detector, net)):
        utils.draw_faces(frame, faces)
        used[i], spent[i] = memory(), time.process_time()
        if i + 1 in (settled * length, laps * length):
            handles.append(count_handles())
    threads, descriptors = handles[1] - handles[0]
    times = np.diff(spent[length - 1 :: length])  # of each lap but the first, which are the same frames
    fifth = max(1, len(times) // 5)
    return {
        "frames": laps * length,
        "memory MB": used[settled * length - 1] / MEGABYTE,
        "memory growth MB": (used[settled * length :].max() - used[settled * length - 1]) / MEGABYTE,
        "threads more": int(threads),
        "descriptors more": int(descriptors),
        "ms a frame": 1000 * float(np.median(times)) / length,
        "time of the last fifth, beside the first": float(np.median(times[-fifth:]) / np.median(times[:fifth])),
    }


@contextmanager
def fickle_camera(frames, fps=25):
    """Serve frames as a camera in the network that breaks off after the last one, and is away at every second request.

    Yields its address and a list with the time of each of its comings.
    """
    pictures, comings, requests = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in frames], [], []

    class Fickle(Camera):
        def do_GET(self):
            requests.append(time.monotonic())
            if len(requests) % 2 == 0:
                self.send_error(503)
                return
            comings.append(requests[-1])
            self.begin()
            try:
                for picture in pictures:
                    self.send(picture)
                    time.sleep(1 / fps)
            except OSError:  # the viewer is gone
                pass

    with serve(Fickle) as address:
        yield address, comings


def soak_camera(frames, detector, net, times, settled=5):
    """Analyse and draw the stream of a camera that comes `times` times; return figures by name.

    Args:
        frames: list of (h, w, 3) uint8 BGR, what the camera shows each time.
        detector, net: as in `soak_file`.
        times: int, at least twice `settled`.
        settled: the median of this many first comings is compared with that of as many last ones: threads that serve
            come and go with them.
    """
    most = np.zeros((times + 1, 3))  # for each coming: memory, threads, descriptors
    with fickle_camera(frames) as (address, comings):
        with closing(utils.analyse(utils.Video(address), detector, net)) as stream:
            seen = 0
            while len(comings) <= times:
                _, frame, faces = next(stream)
                utils.draw_faces(frame, faces)
                seen += 1
                number = min(len(comings), times)
                most[number] = np.maximum(most[number], [memory(), *count_handles()])
    more = np.median(most[-settled:], axis=0) - np.median(most[1 : settled + 1], axis=0)
    return {
        "camera: times it came": times,
        "camera: frames": seen,
        "camera: memory growth MB": more[0] / MEGABYTE,
        "camera: threads more": int(more[1]),
        "camera: descriptors more": int(more[2]),
    }


def tell(figures):
    """Print a line for each figure; return the names of those that are over their limit."""
    over = [name for name, limit in LIMITS.items() if figures.get(name, 0) > limit]
    for name, value in figures.items():
        value = value if isinstance(value, str) else f"{value:.6g}"
        limit = f"  ({'over' if name in over else 'within'} the limit of {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{name:<42} {value:>9}{limit}")
    return over


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=30_000, help="length of the stream (default: %(default)s)")
    parser.add_argument(
        "--times", type=int, default=50, help="that the camera comes, 10 or more (default: %(default)s)"
    )
    parser.add_argument("--output", default="", help="write the figures to this .json file, too")
    arguments = parser.parse_args()
    pin_to_one_core()
    cv2.setNumThreads(1)
    detector, net = utils.FaceDetector(), utils.EmotionNet()
    second = [frame for seconds, frame in utils.Video(utils.CLIP) if 9 <= seconds < 10]
    figures = {"detector": detector.name} | soak_camera(second, detector, net, arguments.times)
    figures |= soak_file(utils.CLIP, detector, net, arguments.frames)
    over = tell(figures)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
