"""What each command takes here, in seconds and memory, and how fast recordings are read: `make times`.

Every command is run several times, one after the other, and the median of its times counts. The figures are those of
this machine; they go to results/times.json and into the README.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import cv2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402 (its folder is on sys.path from here on)

ROUNDS = 3
RESULT, README = utils.RESULTS / "times.json", utils.ROOT / "README.md"
COMMANDS = {  # as the README's table shows them: what is run
    "predict_live_stream.py --source CLIP": ["predict_live_stream.py", "--source", utils.CLIP],
    "preprocess.py": ["preprocess.py", "--output", "faces"],
    "predict.py --image PICTURE": ["predict.py", "--image", "picture.png"],
    "predict.py": ["predict.py"],
    "hack_the_cnn.py": ["hack_the_cnn.py", "--output", "hack"],
    "annotate_videos.py": ["annotate_videos.py", "--output", "archive"],
    "train.py --iteration plain --epochs 1": (
        ["train.py", "--iteration", "plain", "--epochs", "1", "--run", "run", "--output", "model"]
    ),
}


def run(arguments, folder):
    """Run a script in a folder of its own; return the seconds that it takes and the MB of its largest process.

    Raises:
        RuntimeError: it fails.
    """
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        command = [sys.executable, utils.ROOT / "scripts" / arguments[0], *map(str, arguments[1:])]
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(map(str, arguments))} failed: {said.read().decode()[-2000:]}")
    return seconds, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def time_commands():
    """Return for each command the median of its seconds, and the most MB that one of its processes had."""
    runs = {name: [] for name in COMMANDS}
    frame = next(frame for seconds, frame in utils.Video(utils.CLIP) if seconds >= 9)
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            with tempfile.TemporaryDirectory() as folder:
                cv2.imwrite(str(Path(folder) / "picture.png"), frame)
                runs[name].append(run(arguments, folder))
            print(f"{name:<40} {runs[name][-1][0]:6.1f} s {runs[name][-1][1]:6.0f} MB", flush=True)
    return {
        name: {"seconds": statistics.median(s for s, _ in laps), "MB": max(memory for _, memory in laps)}
        for name, laps in runs.items()
    }


def time_archive(minutes=8):
    """Return how many hours of 640x360 video an hour are read, from start to end, and the share of decoding in it."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.mp4") for number in range(minutes)]
        writer = cv2.VideoWriter(str(paths[0]), cv2.VideoWriter.fourcc(*"mp4v"), 25, (640, 360))
        frames = [frame[60:420] for _, frame in utils.Video(utils.CLIP)]
        for i in range(60 * 25):
            writer.write(frames[i % len(frames)])
        writer.release()
        for path in paths[1:]:
            path.write_bytes(paths[0].read_bytes())
        for name, options in (
            ("one worker", ["--workers", 1]),
            ("two workers", ["--workers", 2]),
            ("one worker, --rate 1", ["--workers", 1, "--rate", 1]),
        ):
            arguments = ["annotate_videos.py", "--videos", *paths, *options]
            laps = [run([*arguments, "--output", f"{folder}/{name} {lap}"], folder)[0] for lap in range(ROUNDS)]
            figures[name] = minutes * 60 / statistics.median(laps)
            print(f"{name:<40} {figures[name]:6.1f} hours of video an hour", flush=True)
        began = time.perf_counter()
        for _ in utils.Video(paths[0]):
            pass
        figures["decoding, seconds a second of video"] = (time.perf_counter() - began) / 60
    return figures


def write_table(times):
    """Return what the README says of times, as markdown."""
    rows = ["| command | time | memory |", "|---|---|---|"]
    for name, lap in times["commands"].items():
        rows.append(f"| `{name}` | {lap['seconds']:.{lap['seconds'] < 10:d}f} s | {lap['MB']:.0f} MB |")
    archive = times["archive"]
    one, two, quick = (archive[name] for name in ("one worker", "two workers", "one worker, --rate 1"))
    share = archive["decoding, seconds a second of video"]
    words = (
        f"`annotate_videos.py` reads {one:.1f} hours of 640x360 video an hour with one worker, {two:.1f} with two, and "
        f"{quick:.1f} with `--workers 1 --rate 1`, which analyses one frame for each answer. "
        f"At {one:.1f} a thousand hours take {1000 / one / 24:.1f} days on one core. At {two / 2:.1f} a core, as with "
        f"two, they take {2000 / two / 16:.0f} hours on 16 and {2000 / two / 128:.1f} on 128, if the disk keeps up. "
        f"Decoding is {share * one:.0%} of that work, and {share * quick:.0%} with `--rate 1`; in larger pictures more."
    )
    return "\n".join([*rows, "", *textwrap.wrap(words, 119, break_on_hyphens=False)])


def main():
    for split in ("train", "test"):
        if not utils.find_fer2013(split, utils.DATA):
            raise utils.InputError(f"the {split} set is missing: `make data` downloads it")
    times = {"cores": os.cpu_count(), "commands": time_commands(), "archive": time_archive()}
    text = utils.fill_in(README.read_text(encoding="utf-8"), "times", write_table(times))
    with utils.replacing(RESULT) as path:
        path.write_text(json.dumps(times, indent=2) + "\n")
    with utils.replacing(README) as path:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    utils.run_script(main, argparse.ArgumentParser(description=__doc__).parse_args)
