"""`python scripts/train.py`, as a user runs it, on a data set of noise that takes seconds."""

import json

import numpy as np
import pandas as pd
import pytest

import utils
from tests.conftest import assert_one_clear_line

SMALL = ["--batch-size", 32, "--precision", "float32"]


@pytest.fixture
def train(run_script, small_fer2013, tmp_path):
    def run(*arguments, run="run", data=small_fer2013, environment=None):
        folders = ["--data", data, "--run", tmp_path / run, "--output", tmp_path / "model"]
        return run_script("train.py", *SMALL, *folders, *arguments, timeout=300, **environment or {})

    return run


def test_trains_saves_and_reports(train, tmp_path):
    process = train("--epochs", 3)
    assert process.returncode == 0, process.stderr
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {
        "my_own_model.pkl", "my_own_model.tflite", "my_own_model.json", "my_own_model_architecture.txt",
        "my_own_model_log.csv", "learning_curves.png",
    }  # fmt: skip
    log = pd.read_csv(tmp_path / "run" / "log.csv")
    assert len(log) == 3 and log["loss"].iloc[-1] < log["loss"].iloc[0]
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))
    report = json.loads((tmp_path / "model" / "my_own_model.json").read_text())
    assert report["arguments"]["epochs"] == report["epochs_trained"] == 3
    assert report["best_epoch"] == log["val_loss"].idxmin() + 1
    faces = np.random.default_rng(0).integers(0, 256, (3, 48, 48)).astype(np.uint8)
    expected = utils.load_model(tmp_path / "model" / "my_own_model.pkl").predict(faces[..., None] * 1.0, verbose=0)
    net = utils.EmotionNet(tmp_path / "model" / "my_own_model.tflite")
    assert net.predict(faces) == pytest.approx(expected, abs=1e-5)
    again = train("--epochs", 3)
    assert again.returncode == 0 and "was trained to its end before" in again.stdout
    assert len(pd.read_csv(tmp_path / "run" / "log.csv")) == 3
    assert "Rescaling" in (tmp_path / "model" / "my_own_model_architecture.txt").read_text(encoding="utf-8")


def test_a_run_that_was_stopped_goes_on_to_the_same_result(train, tmp_path):
    """Pull the plug after the first epoch of two; the log that is there in the end is that of a whole run."""
    assert train("--epochs", 2, run="whole").returncode == 0
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('PULL_THE_PLUG'):\n"
        "    import keras\n"
        "    class Plug(keras.callbacks.Callback):\n"
        "        def on_epoch_begin(self, epoch, logs=None):\n"
        "            if epoch == 1:\n"
        "                os._exit(9)\n"
        "    fit = keras.Model.fit\n"
        "    keras.Model.fit = lambda *a, callbacks, **k: fit(*a, callbacks=[*callbacks, Plug()], **k)\n"
    )
    stopped = train("--epochs", 2, run="stopped", environment={"PULL_THE_PLUG": "1", "PYTHONPATH": str(tmp_path)})
    assert stopped.returncode == 9
    assert len(pd.read_csv(tmp_path / "stopped" / "log.csv")) == 1
    assert train("--epochs", 2, run="stopped").returncode == 0
    whole, resumed = (pd.read_csv(tmp_path / run / "log.csv") for run in ("whole", "stopped"))
    assert resumed["epoch"].tolist() == [0, 1]
    assert resumed["loss"].to_numpy() == pytest.approx(whole["loss"].to_numpy(), rel=1e-3)
    assert resumed["val_loss"].to_numpy() == pytest.approx(whole["val_loss"].to_numpy(), rel=1e-3)


def test_a_run_is_not_continued_with_other_arguments(train):
    assert train("--epochs", 1).returncode == 0
    assert_one_clear_line(train("--epochs", 1, "--learning-rate", 0.01), "another learning_rate", "--run")


def test_the_test_rows_are_never_opened(train, small_fer2013, tmp_path):
    """train.csv is enough, and a broken file with the test rows beside it harms nothing."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_bytes((small_fer2013 / "train.csv").read_bytes())
    for name in ("icml_face_data.csv", "test.csv", "test_with_emotions.csv"):
        (folder / name).write_text("this would be an error if somebody read it")
    assert train("--epochs", 1, data=folder).returncode == 0
    assert [path.name for path in (folder / "cache").iterdir()] == ["train.npz"]


@pytest.mark.parametrize(
    "flag, value",
    [("--epochs", 0), ("--batch-size", 0), ("--precision", "foo"), ("--learning-rate", "nan"), ("--limit", 2)],
)
def test_arguments_that_make_no_sense_are_one_clear_line(train, tmp_path, flag, value):
    assert_one_clear_line(train(flag, value), "expected")
    assert not (tmp_path / "run").exists()


def test_without_data_it_says_how_to_get_it(train, tmp_path):
    assert_one_clear_line(train(data=tmp_path / "nothing"), "no train set", "make data")
    assert not (tmp_path / "model").exists()
