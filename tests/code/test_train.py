"""`python scripts/train.py`, as a user runs it, on a data set of noise that takes seconds."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import utils
from tests.conftest import assert_one_clear_line, load_script

SMALL = ["--limit", 105, "--batch-size", 32, "--precision", "float32"]
WITHOUT = "import sys\nfor name in ('matplotlib', 'pandas', 'seaborn', 'tensorboard'):\n    sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def train_module():
    """scripts/train.py as a module."""
    return load_script("train")


@pytest.fixture
def train(call_script, small_fer2013, tmp_path):
    def run(*arguments, run="run", data=small_fer2013, start=call_script, **environment):
        folders = ["--data", data, "--run", tmp_path / run, "--output", tmp_path / "model"]
        return start("train.py", *SMALL, *folders, *arguments, **environment)

    return run


@pytest.fixture(scope="module")
def bare_project(small_fer2013, tmp_path_factory):
    """The one command in a checkout without results, and what it printed.

    Broken test rows lie beside train.csv, and no package is there but Keras, NumPy and OpenCV.
    """
    folder = tmp_path_factory.mktemp("bare")
    project, data = folder / "project", folder / "project" / "data"
    for name in ("utils.py", "training.py", "scripts/train.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(utils.ROOT / name, project / name)
    data.mkdir()
    shutil.copy(small_fer2013 / "train.csv", data)
    for name in ("icml_face_data.csv", "test.csv", "test_with_emotions.csv"):
        (data / name).write_text("this would be an error if somebody read it")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    command = [sys.executable, project / "scripts" / "train.py", *map(str, SMALL), "--epochs", "3"]
    environment = os.environ | {"PYTHONPATH": str(folder), "HOME": str(folder)}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return project, process.stdout


def test_one_command_makes_the_model_from_train_csv_and_nothing_else(bare_project):
    project, printed = bare_project
    assert printed.count("min left") == 3 and "learning_curves.png was not drawn" in printed
    assert [path.name for path in (project / "data" / "cache").iterdir()] == ["train.npz"]
    results = project / "results" / "model"
    names = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    assert names == {
        "my_own_model.pkl", "my_own_model.tflite", "my_own_model.json", "my_own_model_architecture.txt",
        "iterations.csv", "logs/deep.csv", "SHA256SUMS",
    }  # fmt: skip
    assert pd.read_csv(results / "logs" / "deep.csv")["side"].tolist() == [32, 48, 48]
    report = json.loads((results / "my_own_model.json").read_text())
    row = pd.read_csv(results / "iterations.csv").set_index("iteration").loc["deep"]
    assert row["validation_accuracy"] == report["validation_accuracy"] and row["architecture"] == "deep"
    faces = np.random.default_rng(0).integers(0, 256, (3, 48, 48)).astype(np.uint8)
    expected = utils.load_model(results / "my_own_model.pkl").predict(faces[..., None] * 1.0, verbose=0)
    assert utils.EmotionNet(results / "my_own_model.tflite").predict(faces) == pytest.approx(expected, abs=1e-5)
    text = (results / "my_own_model_architecture.txt").read_text(encoding="utf-8")
    assert f"{report['parameters']:,}" in text and f"{report['validation_accuracy']:.1%}" in text


def test_a_recorded_run_is_trained_again_only_if_asked(train, tmp_path):
    """An iteration gets its row and log, and leaves the model alone."""
    first = train("--epochs", 2, "--iteration", "plain")
    assert first.returncode == 0, first.stderr
    assert not list((tmp_path / "model").glob("my_own_model*"))
    log = pd.read_csv(tmp_path / "model" / "logs" / "plain.csv")
    assert len(log) == 2 and (log["seconds"] > 0).all()
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))
    again = train("--epochs", 2, "--iteration", "plain")
    assert again.returncode == 0 and "holds this run of plain" in again.stdout and "epoch 1:" not in again.stdout
    anew = train("--epochs", 2, "--iteration", "plain", "--again")
    assert anew.returncode == 0 and "epoch 1:" in anew.stdout
    shutil.copytree(tmp_path / "run", tmp_path / "carried")  # as from another machine, where it took other seconds
    log["seconds"] += 7
    log.to_csv(tmp_path / "carried" / "log.csv", index=False)
    carried = train(
        "--epochs", 2, "--iteration", "plain", "--again", run="carried"
    )  # it is saved before it is repeated
    assert carried.returncode == 0 and "epoch 1:" not in carried.stdout and "results are in" in carried.stdout
    assert "carried holds this run, ended and not saved yet; delete it to train anew" in carried.stdout
    assert pd.read_csv(tmp_path / "model" / "logs" / "plain.csv").equals(log)
    other = train("--epochs", 1, "--iteration", "plain", "--again")
    assert_one_clear_line(other, "another epochs", "--run")
    assert len(pd.read_csv(tmp_path / "run" / "log.csv")) == 2  # it is another run, and is not removed
    rows = pd.read_csv(tmp_path / "model" / "iterations.csv")
    assert rows["iteration"].tolist() == ["plain"]


def test_a_run_that_is_killed_goes_on_to_the_same_result(train, run_script, bare_project, tmp_path):
    """The second epoch is killed while its state is written. Log and best weights end as those of a whole run."""
    arguments = ["--iteration", "deep", "--epochs", 3]  # targets change after the second
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('KILLED'):\n"
        "    import numpy as np\n"
        "    savez = np.savez\n"
        "    def killed(file, *arrays, **named):\n"
        "        if len(str(named.get('log', '')).split('epoch')) > 2:\n"
        "            open(file, 'wb').write(b'half')\n"
        "            os.kill(os.getpid(), 9)\n"
        "        savez(file, *arrays, **named)\n"
        "    np.savez = killed\n"
    )
    killed = train(*arguments, run="killed", start=run_script, KILLED="1", PYTHONPATH=str(tmp_path))
    assert killed.returncode == -9
    assert len(pd.read_csv(tmp_path / "killed" / "log.csv")) == 1
    (tmp_path / "killed" / "state0.npz").write_bytes(b"half")  # as where a file is not renamed whole
    assert train(*arguments, run="killed").returncode == 0
    runs = bare_project[0] / "runs" / "deep", tmp_path / "killed"
    whole, resumed = (pd.read_csv(run / "log.csv") for run in runs)
    assert resumed["epoch"].tolist() == [1, 2, 3]
    for name in ("loss", "val_loss", "learning_rate"):
        assert resumed[name].to_numpy() == pytest.approx(whole[name].to_numpy(), rel=1e-3)
    whole, resumed = (np.load(run / "weights.npz") for run in runs)
    for name in whole.files:
        assert resumed[name] == pytest.approx(whole[name], abs=1e-3)


def test_two_trainings_do_not_share_a_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    with utils.locked(tmp_path / "run"):
        second = train("--iteration", "plain", "--epochs", 1)
        assert_one_clear_line(second, "run is in use by another process")
        assert not list((tmp_path / "run").glob("state*"))
    assert train("--iteration", "plain", "--epochs", 1).returncode == 0


def test_every_iteration_is_another_recipe_and_the_one_that_ships_is_among_them(train_module):
    recipes = list(train_module.ITERATIONS.values())
    assert len(set(recipes)) == len(recipes) and train_module.SHIPPED in train_module.ITERATIONS
    assert train_module.QUESTIONS.keys() == train_module.ITERATIONS.keys()


def test_learning_curves_show_both_losses_and_what_is_kept(train_module):
    log = {"epoch": [1.0, 2.0, 3.0]} | dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), [1.0, 0.8, 0.9])
    figure = train_module.plot_run(log, {"best_epoch": 2}, train_module.recipe_of("deep", 3))
    drawn = {line.get_label() for line in figure.axes[0].lines}
    assert {"validation faces", "training faces, as they were changed", "the weights that are kept"} <= drawn


@pytest.mark.parametrize(
    "flag, value",
    [("--epochs", -1), ("--iteration", "best"), ("--batch-size", 0), ("--precision", "foo"), ("--limit", 2)],
)
def test_arguments_that_make_no_sense_are_one_clear_line(train, tmp_path, flag, value):
    assert_one_clear_line(train(flag, value), "expected")
    assert not (tmp_path / "run").exists()


def test_without_data_it_says_how_to_get_it(train, tmp_path):
    assert_one_clear_line(train(data=tmp_path / "nothing"), "no train set", "make data")
    assert not (tmp_path / "model").exists()
