"""Measure this project beside others that read emotions from faces, on the same frames and one core: `make compare`.

Each project is installed into an environment of its own, once. Every project runs in a process of its own, and
they take turns at each set of frames, so that other work on the machine slows all alike. The time of a frame is
processor time. One that cannot be installed, or stops, is told. Writes results/compare.json, compare.png and the
README's table. It runs on Linux; the first run needs the network, and the accuracy FER2013's test set.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402 (its folder is on sys.path from here on)
from tests.benchmark import frames_with_one_face, pin_to_one_core  # noqa: E402

OURS = "this project"
PEERS = {  # what is installed: the project, and beside it releases that it needs and does not ask for
    "fer": ("fer==25.10.3", "opencv-contrib-python==4.14.0.94", "setuptools==80.10.2", "torch==2.13.0"),
    "deepface": ("deepface==0.0.103", "opencv-contrib-python-headless==4.14.0.94", "werkzeug==3.1.9"),
}
SETS = [f"{size}, {faces}" for faces in ("one face", "six faces") for size in ("640x480", "1920x1080")]
ROWS = {f"{name}, stream": (f"a frame of a stream: {name}", "{:.1f} ms") for name in SETS}
ROWS |= {f"{name}, picture": (f"a picture alone: {name}", "{:.1f} ms") for name in SETS}
ROWS |= {
    "first answer": ("from the start to the first answer", "{:.2f} s"),
    "import": ("of that, the import", "{:.2f} s"),
    f"{SETS[0]}, memory": ("memory at most, 640x480, one face", "{:.0f} MB"),
    "installed": ("installed size", "{:.0f} MB"),
}


class Stopped(Exception):
    """A project cannot be installed, or its process ended; the message is the last line that it wrote."""


def last_line(text):
    """Return the last line of what a process wrote, as one that fits on a page."""
    plain = text.encode("ascii", "ignore").decode()  # without emoji
    return utils.shorten((plain.strip().splitlines() or ["it ended without a word"])[-1], 110)


class Worker:
    """A process of tools/compare_worker.py.

    Args:
        project, python, folder: its name, the Python that has it, and the Path of the frames.

    Attributes:
        figures: of its start, a dict of seconds.

    Raises:
        Stopped: the process ended; in `read`, too.
    """

    def __init__(self, project, python, folder):
        self._log = folder / f"{project}.log"
        environment = os.environ | {"DEEPFACE_HOME": str(folder)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment, "text": True}
        began = time.perf_counter()
        with open(self._log, "w") as log:
            command = [python, Path(__file__).with_name("compare_worker.py"), project, folder]
            self._process = subprocess.Popen(command, stderr=log, **pipes)
        self.figures = self._next() | {"first answer": time.perf_counter() - began}

    def read(self, name):
        """Return the figures of a set of frames as a dict."""
        print(name, file=self._process.stdin, flush=True)
        return self._next()

    def _next(self):
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise Stopped(last_line(self._log.read_text()))
        return json.loads(line)

    def close(self):
        self._process.kill()
        self._process.communicate()


def install(project, folder):
    """Return the Python of an environment that has a project, or what ours needs; made in `folder` unless it is there.

    Raises:
        Stopped: pip failed.
    """
    place = folder / project.replace(" ", "-")
    python, ready = place / "bin" / "python", place / "ready"
    needs = PEERS.get(project) or re.findall(r"^[^#\s]+", (ROOT / "requirements.txt").read_text(), re.M)
    if not ready.is_file() or ready.read_text().split() != [*needs]:
        print(f"installing {project} into {place} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        command = [python, "-m", "pip", "install", "--no-cache-dir", *needs]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise Stopped(last_line(process.stderr))
        ready.write_text("\n".join(needs))
    return python


def check_peers(projects, stopped):
    """Refuse to go on without another project than this one; `stopped` says of each why it is not there."""
    if {*projects} <= {OURS}:
        told = "; ".join(f"{peer}: {why}" for peer, why in stopped.items())
        raise utils.InputError(f"no other project can be measured, and nothing is written ({told})")


def make_frames(count):
    """Return (count, h, w, 3) uint8 frames of the bundled clip for each of SETS.

    One face: the clip itself, in 1920x1080 with its edge drawn out. Six: parts of it from six times, side by side.
    """
    detector = utils.FaceDetector()
    frames = frames_with_one_face(utils.CLIP, detector, 6 * count)
    times = [frames[i * count : (i + 1) * count] for i in range(6)]
    faces = [detector.detect(some[0])[0] for some in times]
    sets = {}
    for name in SETS:
        width, height = map(int, name.split(",")[0].split("x"))
        sets[name] = np.empty((count, height, width, 3), np.uint8)
        for i in range(count):
            if "one" in name:
                scaled = cv2.resize(frames[i], (round(height * 4 / 3), height))
                sides = [(width - scaled.shape[1]) // 2] * 2
                sets[name][i] = cv2.copyMakeBorder(scaled, 0, 0, *sides, cv2.BORDER_REPLICATE)
            else:
                tiles = []
                for some, face in zip(times, faces, strict=True):
                    part = round(2.2 * face.side * width / height * 2 / 3), round(2.2 * face.side)
                    tile = cv2.getRectSubPix(some[i], part, (face.x, face.y))
                    tiles.append(cv2.resize(tile, (round(width / 3), height // 2)))
                sets[name][i] = cv2.resize(np.vstack([np.hstack(tiles[:3]), np.hstack(tiles[3:])]), (width, height))
    return sets


def measure(pythons, folder, starts, rounds):
    """Start the projects in turn, give them the frames in turn, and the test set once.

    Args:
        pythons: dict from the name of a project to the Python that has it.
        folder: Path of first.npy and a file for each of SETS; where it has test.npy, of labels.npy too.
        starts, rounds: how often each is started, and gets each set.

    Returns:
        A dict from project to figure to a list of values, and one from each project that stopped to its last words.
    """
    figures, stopped, workers = {project: {} for project in pythons}, {}, {}
    steps = ["start"] * starts + SETS * rounds + ["test"] * (folder / "test.npy").is_file()
    try:
        for step, project in ((step, project) for step in steps for project in pythons):
            if project in stopped:
                continue
            try:
                if step == "start":
                    if project in workers:
                        workers.pop(project).close()
                    workers[project] = Worker(project, pythons[project], folder)
                new = workers[project].figures if step == "start" else workers[project].read(step)
            except Stopped as error:
                stopped[project] = str(error)
                continue
            for figure, value in new.items():
                figures[project].setdefault(figure, []).append(value)
    finally:
        for worker in workers.values():
            worker.close()
    return {project: some for project, some in figures.items() if project not in stopped}, stopped


def summarise(figures, stopped):
    """Return what results/compare.json holds: medians, the ratios of each other project to this one, and who stopped.

    Args:
        figures, stopped: as `measure` returns them. A ratio is the median of the ratios of values that were measured
            one after the other; of the memory it is the first value, before larger frames came.
    """
    for some in figures.values():
        some |= {figure: values[:1] for figure, values in some.items() if figure.endswith("memory")}
    medians = {
        project: {f: float(np.median(values)) for f, values in some.items()} for project, some in figures.items()
    }
    ratios = {
        project: {f: float(np.median(np.divide(some[f], figures[OURS][f]))) for f in ROWS if f in some}
        for project, some in figures.items()
        if project != OURS
    }
    return {"projects": medians, "ratios": ratios, "stopped": stopped, "packages": PEERS}


def describe(result):
    """Return the README's part of a result as markdown: a picture with its words, a table, and who stopped."""
    projects, ratios = result["projects"], result["ratios"]
    names = {peer: packages[0].replace("==", " ") for peer, packages in result["packages"].items()}
    rows = [["what", *(names[peer] for peer in ratios), OURS], ["---"] * (len(ratios) + 2)]
    for figure, (words, form) in ROWS.items():
        beside = [f"{ratios[peer][figure]:.1f} times: {form.format(projects[peer][figure])}" for peer in ratios]
        rows.append([words, *beside, form.format(projects[OURS][figure])])
    order = [projects[project] for project in [*ratios, OURS]]
    found = [", ".join(f"{some[f'{name}, faces']:.1f}" for name in SETS) for some in order]
    rows.append(["faces found in these four", *found])
    if "accuracy" in projects[OURS]:
        rows.append(["accuracy on the 7,178 test faces", *(f"{some['accuracy']:.1%}" for some in order)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += [f"\n{names[peer]} was not measured, it stopped: `{words}`" for peer, words in result["stopped"].items()]
    told = "; ".join(f"{peer} {min(some.values()):.1f} to {max(some.values()):.1f}" for peer, some in ratios.items())
    picture = f"![The ratios of the table as bars: how many times what this project takes, {told}](results/compare.png)"
    return "\n".join([*lines, f"\n{picture}"])


def draw(ratios):
    """Return a matplotlib figure of the ratios: for each figure and project a bar that starts at 1, this project."""
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    titles, values = [], [1.0]
    for i, (peer, some) in enumerate(ratios.items()):
        heights, places = 0.8 / len(ratios), np.arange(len(some)) + 0.8 * (i + 0.5) / len(ratios) - 0.4
        colour = ("#0072B2", "#E69F00")[i]  # which colour-blind people tell apart
        bars = axis.barh(places, np.subtract([*some.values()], 1), heights, left=1, label=peer, color=colour)
        axis.bar_label(bars, [f"{ratio:.1f}" for ratio in some.values()], padding=3)
        frames = [some[f"{name}, stream"] for name in SETS]
        titles.append(f"{peer} takes {min(frames):.1f} to {max(frames):.1f} times as long")
        values += some.values()
    axis.set_yticks(range(len(ROWS)), [words for words, _ in ROWS.values()])
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(0.8 * min(values), 1.4 * max(values))
    axis.set_xticks([tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if min(values) <= tick <= max(values)])
    axis.minorticks_off()
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("times what this project takes (logarithmic)")
    axis.set_title(f"For a frame of a stream, {' and '.join(titles) or 'no other project was measured'}")
    axis.legend(loc="lower right")
    return figure


def main(environments, starts, rounds):
    if not Path("/proc/self/status").is_file():
        raise utils.InputError("memory is read from /proc: this comparison needs Linux")
    environments = Path(environments).resolve()
    pythons, stopped = {}, {}
    for project in (OURS, *PEERS):
        try:
            pythons[project] = install(project, environments)
        except Stopped as error:
            stopped[project] = str(error)
    check_peers(pythons, stopped)
    pin_to_one_core()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, frames in make_frames(20).items():
            np.save(folder / f"{name}.npy", frames)
        np.save(folder / "first.npy", np.load(folder / f"{SETS[0]}.npy")[:1])
        if utils.find_fer2013("test", utils.DATA):
            for name, array in zip(("test", "labels"), utils.load_fer2013("test"), strict=True):
                np.save(folder / f"{name}.npy", array)
        figures, more = measure(pythons, folder, starts, rounds)
    stopped |= more
    if OURS in stopped:
        raise utils.InputError(f"{OURS} cannot be measured: {stopped[OURS]}")
    for project in figures:
        place = Path(pythons[project]).parents[1]
        files = (path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
        figures[project]["installed"] = [sum(path.stat().st_size for path in files) / 1e6]
    check_peers(figures, stopped)
    result = summarise(figures, stopped)
    utils.save_fig(draw(result["ratios"]), utils.RESULTS / "compare.png")
    readme = utils.ROOT / "README.md"
    for path, text in {
        utils.RESULTS / "compare.json": json.dumps(result, indent=2) + "\n",
        readme: utils.fill_in(readme.read_text(encoding="utf-8"), "comparison", describe(result)),
    }.items():
        with utils.replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(describe(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", default=str(ROOT / "runs" / "compare"), help="their folder")
    parser.add_argument("--starts", type=int, default=5, help="of each project (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each set of frames (default: %(default)s)")
    utils.run_script(main, parser.parse_args)
