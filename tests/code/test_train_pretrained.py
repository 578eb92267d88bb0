"""`python scripts/train_pretrained.py`, as a user runs it, from a file of weights that were never trained."""

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

STAGES = ["head", "all"]

# A graph of 160 layers is made more slowly than some of its batches are computed without one.
STARTUP = """\
import os, sys
import tensorflow
tensorflow.config.run_functions_eagerly(True)
opened = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, arguments):
    if event == "open":
        os.write(opened, f"{arguments[0]}\\n".encode())
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def pretrained_module():
    """scripts/train_pretrained.py as a module."""
    return load_script("train_pretrained")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as `weights` wants it; its batch norms are folded, and its layers keep the values about as large."""
    import keras

    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNetV2(input_shape=(128, 128, 3), include_top=False, weights=None)
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights([gamma, rng.normal(0, 0.5, beta.shape), mean, variance])
    path = tmp_path_factory.mktemp("weights") / "some.weights.h5"
    network.save_weights(path)
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the code, with a results folder whose files are broken."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("utils.py", "training.py", "scripts/train_pretrained.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(utils.ROOT / name, folder / name)
    results = folder / "results" / "model"
    results.mkdir(parents=True)
    for name in ("iterations.csv", "pre_trained_stages.csv", "pre_trained_model.pkl", "my_own_model.pkl"):
        (results / name).write_text("broken\n")
    (folder / "sitecustomize.py").write_text(STARTUP)
    return folder


def start(project, arguments):
    """Start the script of a project, with the graph's tracing off and a note of every file that is opened."""
    paths = {"PYTHONPATH": str(project), "OPENED": str(project / "opened.txt"), "MPLBACKEND": "agg"}
    return subprocess.Popen(
        [sys.executable, project / "scripts" / "train_pretrained.py", *map(str, arguments)],
        cwd=project,
        env=os.environ | paths | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def small_run(small_fer2013, weights, tmp_path_factory):
    """The folder and the arguments of a run of two batches an epoch, from a data folder with train.csv alone."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "data").mkdir()
    (folder / "data" / "train.csv").write_bytes((small_fer2013 / "train.csv").read_bytes())
    for name in ("icml_face_data.csv", "test.csv"):
        (folder / "data" / name).write_text("broken\n")
    folders = ["--data", folder / "data", "--run", folder / "run", "--output", folder / "model"]
    small = ["--limit", 40, "--batch-size", 16, "--epochs", 1, "--precision", "float32"]
    return folder, ["--weights", weights, *small, *folders]


@pytest.fixture(scope="module")
def trained(project, small_run):
    """The folder of a run that was killed after an epoch and started again, and what the second start printed."""
    folder, arguments = small_run
    process = start(project, arguments)
    assert any(line.startswith("epoch 1:") for line in process.stdout), process.stderr.read()
    process.kill()
    process.communicate()
    process = start(project, arguments)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder, printed


def test_a_killed_run_goes_on_where_it_was(trained):
    folder, printed = trained
    assert "epoch 1:" not in printed[: printed.index("stage all")]
    for stage, epochs in zip(STAGES, ([1, 2], [1]), strict=True):
        assert list(pd.read_csv(folder / "run" / stage / "log.csv")["epoch"]) == epochs


def test_it_opens_nothing_in_results(trained, project):
    """Neither what 03 left, nor what an earlier run did."""
    opened = set((project / "opened.txt").read_text().split("\n"))
    assert any(path.endswith("train.csv") for path in opened)
    assert not [path for path in opened if path.startswith(f"{project / 'results'}{os.sep}")]


def test_its_results_are_of_the_last_stage(trained):
    results = trained[0] / "model"
    names = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    assert names == {
        "pre_trained_model.pkl", "pre_trained_model.tflite", "pre_trained_model.json",
        "pre_trained_model_architecture.txt", "pre_trained_learning_curves.png", "pre_trained_stages.csv",
        *(f"logs/pre_trained_{stage}.csv" for stage in STAGES), "SHA256SUMS",
    }  # fmt: skip
    report = json.loads((results / "pre_trained_model.json").read_text())
    stages = pd.read_csv(results / "pre_trained_stages.csv").set_index("stage")
    assert list(stages.index) == STAGES
    assert report["stage"] == "all" and report["weights"] == "some.weights.h5"
    assert stages.loc["all", "validation_accuracy"] == report["validation_accuracy"]
    text = (results / "pre_trained_model_architecture.txt").read_text(encoding="utf-8")
    order = [text.index(part) for part in ("WHY", "\nhead: ", "\nall: ", "block_13_expand")]
    assert order == sorted(order) and f"{report['validation_accuracy']:.1%}" in text


def test_its_model_is_one_that_the_other_scripts_run(trained):
    """Through the same two functions, in Keras and in OpenCV."""
    file = trained[0] / "model" / "pre_trained_model.pkl"
    faces = np.random.default_rng(1).integers(0, 256, (3, 48, 48)).astype(np.uint8)
    model = utils.load_model(file)
    expected = model(faces[..., None].astype(np.float32)).numpy()
    assert model.name == "pre_trained_model"
    assert utils.EmotionNet(file.with_suffix(".tflite")).predict(faces) == pytest.approx(expected, abs=1e-4)


def test_the_head_alone_learns_first(trained, weights, pretrained_module):
    """Then all layers do, their batch norms included."""
    model = pretrained_module.build_model(weights)
    kernel, norm, head = (model.get_layer(name) for name in ("Conv1", "bn_Conv1", "emotion"))
    given = kernel.get_weights()[0]
    of_stage = {}
    for stage in STAGES:
        pretrained_module.training.load_weights(model, trained[0] / "run" / stage)
        of_stage[stage] = kernel.get_weights()[0], norm.get_weights()[2], head.get_weights()[0]
    assert (of_stage["head"][0] == given).all()
    assert all((old != new).any() for old, new in zip(of_stage["head"], of_stage["all"], strict=True))
    pretrained_module.training.load_weights(model, trained[0] / "run" / "head")
    norms = [layer for layer in model.layers if layer.name.endswith("BN")]
    assert all(np.ptp(layer.get_weights()[3]) > 0 for layer in norms)  # they have the statistics of faces


def test_a_recorded_run_is_not_repeated(trained, small_run, pretrained_module, capsys):
    """Nor is one that has ended and was not saved yet, though it is asked for again: it is saved."""

    def run(*more):
        arguments = [*map(str, small_run[1]), *more]
        pretrained_module.main(**vars(pretrained_module.parse_args(arguments)))
        return capsys.readouterr().out

    printed = run()
    assert "holds these stages" in printed and "min left" not in printed
    (trained[0] / "model" / "logs" / "pre_trained_all.csv").unlink()
    printed = run("--again")
    assert "results are in" in printed and "min left" not in printed
    with pytest.raises(utils.InputError, match="another weights"):
        run("--weights", str(trained[0] / "other.weights.h5"))


def test_statistics_change_nothing_that_the_network_says(pretrained_module, weights):
    """Nor does it matter afterwards whether the batch norms use those of the faces or their averages."""
    import keras

    keras.utils.set_random_seed(0)
    faces = np.random.default_rng(0).integers(0, 256, (32, 48, 48, 1)).astype(np.float32)
    model = pretrained_module.build_model(weights)
    next(layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)).rate = 0.0
    head = model.get_layer("emotion")
    head.set_weights([10 * head.get_weights()[0], head.get_weights()[1]])  # so that it says something
    values = model.get_weights()
    expected = model(faces, training=False).numpy()
    assert np.ptp(expected, axis=1).min() > 0.05
    assert np.abs(model(faces, training=True).numpy() - expected).max() > 0.01  # which also moves the averages
    model.set_weights(values)
    pretrained_module.give_statistics(model, faces)
    assert model(faces, training=False).numpy() == pytest.approx(expected, abs=1e-3)
    assert model(faces).numpy() == pytest.approx(expected, abs=1e-3)  # it is not in training unless told so
    assert model(faces, training=True).numpy() == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("name, words", [("none.weights.h5", "no weights at"), ("other.weights.h5", "does not hold")])
def test_weights_that_are_not_there_are_told(pretrained_module, tmp_path, name, words):
    (tmp_path / "other.weights.h5").write_bytes(b"no weights")
    with pytest.raises(utils.InputError, match=f"{words}.*weights.h5"):
        pretrained_module.build_model(str(tmp_path / name))


def test_a_failed_download_is_one_clear_line(run_script, small_fer2013, tmp_path):
    """And it leaves nothing behind that would refuse the next try."""
    no_network = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path / "keras")}
    folders = ["--data", small_fer2013, "--run", tmp_path / "run", "--output", tmp_path / "model"]
    process = run_script("train_pretrained.py", *folders, **no_network)
    assert_one_clear_line(process, "could not download", "--weights")
    assert not (tmp_path / "run").exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize("flag, value", [("--epochs", -1), ("--batch-size", 0), ("--patience", 0), ("--seed", -1)])
def test_arguments_that_make_no_sense_are_told(pretrained_module, flag, value):
    with pytest.raises(utils.InputError, match="expected"):
        pretrained_module.main(**vars(pretrained_module.parse_args([flag, str(value)])))
