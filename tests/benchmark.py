"""What the live stream takes beside a simple one, how fast it answers, and its memory, on one core: `make bench`.

The simple stream, `analyse_every_frame`, searches and classifies every frame at full size. Both are fed with the same
frames in turn, so that the ratios hold on any processor and beside other work. The figures in seconds are this
processor's. Prints a line for each figure and its target; only a ratio, or memory that grows, can fail.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402 (its folder is on sys.path from here on)

MEGABYTE = 1e6
TARGETS = {  # figure: (target, whether missing it is a failure)
    "first answer s": (0.5, False),
    "peak memory MB": (350, False),
    "memory growth MB": (10, True),
    "frame of 640x480, ratio": (0.5, True),
    "hour of 640x360 in a file, ratio": (0.25, True),
    "camera of 30 fps, share of a core": (0.25, False),
}


def analyse_every_frame(video, detector, net, smoothing=0.5):
    """Yield what `utils.analyse` yields, the simple way: the reference of the ratios."""
    tracker = utils.FaceTracker()
    for seconds, frame in video:
        tracks = tracker.update(detector.detect(frame, [640]), seconds)
        probabilities = net.predict([utils.crop_face(frame, track.face) for track in tracks])
        pairs = zip(tracks, probabilities, strict=True)
        yield seconds, frame, [(track.id, track.face, track.blend(p, seconds, smoothing)) for track, p in pairs]


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


def core_seconds(stream):
    """Return the processor time that reading a stream to its end takes, in seconds."""
    began = time.process_time()
    for _ in stream:
        pass
    return time.process_time() - began


def measure_first_answer(*_):
    """Return the seconds from the start of the script to its first emotion on stdout: the median of five starts."""
    command = [sys.executable, ROOT / "scripts" / "predict_live_stream.py", "--source", utils.CLIP]
    laps = []
    for _ in range(5):
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            if not any("%" in line for line in process.stdout):
                raise RuntimeError("the script ended without an answer")
            laps.append(time.perf_counter() - began)
            process.kill()
    return {"first answer s": float(np.median(laps))}


def frames_with_one_face(clip, detector, count=40):
    """Return the first `count` frames of the clip in which one face is found."""
    frames = []
    for _, frame in utils.Video(clip):
        if len(detector.detect(frame)) == 1:
            frames.append(frame)
        if len(frames) == count:
            break
    return frames


def measure_stream(frames, detector, net, frame_count):
    """Run `frame_count` frames, ten a second, through the live stream; return figures of time and memory by name."""
    laps, used = np.ones((2, frame_count))  # lists would grow with every frame, which the stream does not

    def stream():
        for i in range(frame_count):
            began = time.perf_counter()
            yield i / 10, frames[i % len(frames)]
            laps[i], used[i] = time.perf_counter() - began, memory()

    for _ in utils.analyse(stream(), detector, net):
        pass
    crop = utils.crop_face(frames[0], detector.detect(frames[0])[0])[None]
    alone = []
    for _ in range(500):
        began = time.perf_counter()
        net.predict(crop)
        alone.append(time.perf_counter() - began)
    early, late = used[min(500, frame_count // 10)], max(used[-frame_count // 10 :])
    return {
        "median ms a face": 1000 * float(np.median(alone)),
        "median ms a frame": 1000 * float(np.median(laps)),
        "95 % ms a frame": 1000 * float(np.quantile(laps, 0.95)),
        "peak memory MB": max(used) / MEGABYTE,
        "memory growth MB": (late - early) / MEGABYTE,
    }


def compare_frames(frames, detector, net, rounds=5):
    """Return the processor time of an analysed frame beside one of the simple stream, which reads the same frames.

    The median frame, as a person who looks at one would measure it, and the mean, in which the fine searches are.
    """

    def laps(analyse):
        result, stream = [], analyse([(i / 10, frame) for i, frame in enumerate(frames)], detector, net)
        for _ in frames:
            began = time.process_time()
            next(stream)
            result.append(time.process_time() - began)
        return result

    both = np.array([[laps(utils.analyse), laps(analyse_every_frame)] for _ in range(rounds)])  # (rounds, 2, frames)
    medians, means = np.median(both, axis=2), both.mean(axis=2)
    return {
        "frame of 640x480, ratio": float(np.median(medians[:, 0] / medians[:, 1])),
        "frame of 640x480, ratio of the means": float(np.median(means[:, 0] / means[:, 1])),
    }


def compare_files(frames, detector, net, rounds=5, seconds=10):
    """The same of a file of 640x360 at 24 fps with one face, decoded too, and the core hours of an hour of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.mp4")
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 24, (640, 360))
        for i in range(24 * seconds):
            writer.write(frames[i % len(frames)][60:420])
        writer.release()
        both = [
            (
                core_seconds(utils.analyse(utils.Video(path, rate=10.0), detector, net)),
                core_seconds(analyse_every_frame(utils.Video(path), detector, net)),
            )
            for _ in range(rounds)
        ]
    return {
        "hour of 640x360 in a file, core hours": float(np.median([new for new, _ in both])) / seconds,
        "hour of 640x360 in a file, ratio": float(np.median([new / simple for new, simple in both])),
    }


class Camera(BaseHTTPRequestHandler):
    """A camera in the network: what it serves is a stream of JPEG pictures."""

    def begin(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()

    def send(self, picture):
        """Send the bytes of a picture; OSError if the viewer is gone."""
        self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n")
        self.wfile.write(b"Content-Length: %d\r\n\r\n%b\r\n" % (len(picture), picture))

    def log_message(self, *arguments):
        pass


@contextmanager
def serve(handler):
    """Let a subclass of Camera answer at the address that is yielded."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/camera.mjpg"
        server.shutdown()


@contextmanager
def camera(frames, fps=30):
    """Serve frames as a camera in the network does, for ever; yield its address and its class, with seconds `spent`."""
    pictures = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in frames]

    class Endless(Camera):
        spent = 0.0  # of this process' time, by the thread that serves

        def do_GET(self):
            self.begin()
            began, i = time.monotonic(), 0
            try:
                while True:
                    self.send(pictures[i % len(pictures)])
                    i += 1
                    Endless.spent = time.thread_time()
                    time.sleep(max(0.0, began + i / fps - time.monotonic()))
            except OSError:  # the viewer is gone
                pass

    with serve(Endless) as address:
        yield address, Endless


def measure_camera(frames, detector, net, seconds=20.0):
    """Return which share of a core the stream of a camera of 30 fps takes, without the camera's own work."""

    def work():
        return time.process_time() - server.spent

    with camera(frames) as (address, server):
        stream = utils.analyse(utils.Video(address, rate=10.0), detector, net)
        next(stream)
        began, used, now = time.monotonic(), work(), 0.0
        while now < seconds:
            now, _, _ = next(stream)
        share = (work() - used) / (time.monotonic() - began)
        stream.close()
    return {"camera of 30 fps, share of a core": share}


def show(figures, more):
    """Print more figures, and add them to the dict of all."""
    for name, value in more.items():
        target = f"  (target: under {TARGETS[name][0]:g})" if name in TARGETS else ""
        print(f"{name:<38} {value:>8.3f}{target}", flush=True)
    figures |= more


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000, help="length of the stream (default: %(default)s)")
    parser.add_argument("--output", default="", help="write the figures to this .json file, too")
    arguments = parser.parse_args()
    pin_to_one_core()
    cv2.setNumThreads(1)
    detector, net = utils.FaceDetector(), utils.EmotionNet()
    frames = frames_with_one_face(utils.CLIP, detector)
    figures = {"detector": detector.name}
    for measure in (measure_first_answer, compare_frames, compare_files, measure_camera):
        show(figures, measure(frames, detector, net))
    show(figures, measure_stream(frames, detector, net, arguments.frames))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures | {"frames": arguments.frames}, indent=2) + "\n")
    sys.exit(any(figures[name] >= target for name, (target, fails) in TARGETS.items() if fails))


if __name__ == "__main__":
    main()
