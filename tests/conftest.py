"""What the tests share: the portraits, small stand-ins for FER2013 and for the model, and a way to run scripts."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import matplotlib
import matplotlib.cbook
import nbformat
import numpy as np
import papermill
import pytest
import skimage.data

import utils

matplotlib.use("agg")  # figures need no screen
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else Keras sets 1, and scripts inherit it


class Minutes:
    """Writes into the dots of pytest, once a minute, how long it has taken and how many tests are done."""

    def __init__(self, reporter):
        self.reporter, self.began, self.told, self.done = reporter, time.monotonic(), 0, 0

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_runtest_logfinish(self):
        self.done += 1
        minutes = int((time.monotonic() - self.began) / 60)
        if minutes > self.told:
            self.told = minutes
            self.reporter.write(f" {minutes} min: {self.done} of {self.session.testscollected} tests\n")


@pytest.hookimpl(trylast=True)  # after pytest has made its reporter
def pytest_configure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter:  # the processes of pytest-xdist have none
        config.pluginmanager.register(Minutes(reporter))


needs_yunet = pytest.mark.skipif(not utils.YUNET.is_file(), reason="YuNet is not there: `make data` downloads it")


def needs_split(split):
    """Return a mark that skips a test where no file with `split` of FER2013 is there."""
    there = utils.find_fer2013(split, utils.DATA)
    return pytest.mark.skipif(there is None, reason=f"FER2013's {split} set is not there: `make data` downloads it")


needs_data, needs_test_set = needs_split("train"), needs_split("test")


@pytest.fixture
def run_script(tmp_path):
    """Run a script as a user would, from a folder of its own; return the finished process with its text."""

    def run(name, *arguments, **environment):
        return subprocess.run(
            [sys.executable, utils.ROOT / "scripts" / name, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"MPLBACKEND": "agg"} | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(scope="session")
def project(small_fer2013, small_digits, tmp_path_factory):
    """A copy of the project with small data sets, where everything may be written. `make` finds a .venv in it."""
    folder = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(utils.ROOT, folder, ignore=shutil.ignore_patterns(".*", "data", "runs", "report", "__pycache__"))
    shutil.copytree(small_fer2013, folder / "data")
    shutil.copy(utils.ROOT / "data" / "README.md", folder / "data")
    shutil.copytree(small_digits, folder / "data" / "digit-recognizer")
    if utils.YUNET.is_file():
        shutil.copytree(utils.YUNET.parent, folder / "data" / "models")
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (folder / ".venv" / path.name).symlink_to(path)
    for made in (folder / ".venv" / "ready", folder / "data" / "models" / "tried"):
        made.unlink(missing_ok=True)  # a link to the file of the project itself
        made.parent.mkdir(exist_ok=True)
        made.touch()
    return folder


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that Playwright drives; it asks for nothing but what its pages ask for."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not there: `make setup` installs it")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not there: `apt install chromium`")
    with sync_api.sync_playwright() as playwright:
        flags = ["--disable-gpu", "--disable-quic", "--disable-sync", "--disable-background-networking"]
        yield playwright.chromium.launch(executable_path=chromium, args=flags, timeout=0)  # pytest-timeout ends it


@pytest.fixture
def call_script(tmp_path, monkeypatch, capfd):
    """Do what `run_script` does within this process, where TensorFlow is started once and not for every call."""
    monkeypatch.setattr(utils, "_end_like_ctrl_c", lambda: None)  # the signals of pytest stay as they are

    def call(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        code = None
        try:
            runpy.run_path(str(utils.ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
        output = capfd.readouterr()
        said = f"{code}\n" if isinstance(code, str) else ""  # which Python writes to stderr, and exits with 1
        return subprocess.CompletedProcess(name, 1 if said else code or 0, output.out, output.err + said)

    return call


def execute_notebook(notebook, parameters, output):
    """Execute a notebook with papermill in its own folder; write it to `output`, and return it."""
    quiet = {"kernel_name": "python3", "progress_bar": False, "start_timeout": 600}
    papermill.execute_notebook(notebook, output, parameters, cwd=notebook.parent, **quiet)
    return nbformat.read(output, as_version=4)


def read_json(path):
    """Return what a JSON file holds, or None while it is not there or is being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def load_script(name):
    """Return a script as a module, to call its functions: load_script("train") is scripts/train.py."""
    spec = importlib.util.spec_from_file_location(name, utils.ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_one_clear_line(process, *words):
    """Assert that a process failed as a person would want it to: one line on stderr, with `words`, and no traceback.

    That the Haar cascade stands in for YuNet may be told before.
    """
    lines = [line for line in process.stderr.strip().splitlines() if not line.startswith("YuNet is missing")]
    assert process.returncode == 1, process.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert str(word) in lines[0]


@pytest.fixture(scope="session")
def astronaut():
    """Eileen Collins, (512, 512, 3) uint8 BGR; her face is about 100 pixels high, at (225, 110)."""
    return skimage.data.astronaut()[..., ::-1].copy()


@pytest.fixture(scope="session")
def hopper():
    """Grace Hopper, (600, 512, 3) uint8 BGR; her face is about 200 pixels high, at (260, 170)."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture
def write_video(tmp_path):
    """Write frames to a video in a temporary folder and return its path."""

    def write(frames, name="video.mp4", fps=10):
        path = tmp_path / name
        height, width = frames[0].shape[:2]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
        for frame in frames:
            writer.write(frame)
        writer.release()
        return path

    return write


@pytest.fixture(scope="session")
def small_fer2013(tmp_path_factory):
    """A folder with a train.csv and an icml_face_data.csv of 210 and 70 noise images, as many of each emotion."""
    folder = tmp_path_factory.mktemp("fer2013")
    rng = np.random.default_rng(0)

    def row(number):
        emotion = number % 7
        brightness = 30 * emotion + rng.integers(0, 40, utils.SIDE * utils.SIDE)  # something to learn
        return emotion, " ".join(map(str, brightness))

    train = [row(i) for i in range(210)]
    test = [row(i) for i in range(70)]
    with open(folder / "train.csv", "w") as file:
        file.write("emotion,pixels\n" + "".join(f"{emotion},{pixels}\n" for emotion, pixels in train))
    with open(folder / "icml_face_data.csv", "w") as file:
        file.write("emotion, Usage, pixels\n")
        file.writelines(f"{emotion},Training,{pixels}\n" for emotion, pixels in train)
        for i, (emotion, pixels) in enumerate(test):
            file.write(f"{emotion},{'PublicTest' if i < 35 else 'PrivateTest'},{pixels}\n")
    return folder


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory):
    """A folder with a train.csv and a test.csv as digit-recognizer has them, of 200 and 30 bars at ten heights."""
    folder = tmp_path_factory.mktemp("digits")
    labels = np.arange(230) % 10
    images = np.random.default_rng(0).integers(0, 60, (230, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 7, 6:22] = 255
    names = ",".join(f"pixel{i}" for i in range(784))
    rows = np.column_stack([labels, images.reshape(230, -1)])
    for name, part, header in (("train", rows[:200], f"label,{names}"), ("test", rows[200:, 1:], names)):
        np.savetxt(folder / f"{name}.csv", part, fmt="%d", delimiter=",", header=header, comments="")
    return folder


@pytest.fixture(scope="session")
def build_small_model():
    """Build a small untrained model that keeps the project's contract, or breaks it in input or output."""

    def build(side=48, emotions=7):
        import keras
        from keras import layers

        keras.utils.set_random_seed(1)
        inputs = keras.Input((side, side, 1))
        x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
        x = layers.Conv2D(8, 5, strides=4, activation="relu")(x)
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, layers.Dense(emotions, activation="softmax")(x))

    return build
