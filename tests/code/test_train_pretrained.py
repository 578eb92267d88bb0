"""`python scripts/train_pretrained.py`, as a user runs it, from a file of weights that were never trained."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest

import utils
from tests.conftest import assert_one_clear_line, load_script


@pytest.fixture(scope="module")
def pretrained_module():
    """scripts/train_pretrained.py as a module."""
    return load_script("train_pretrained")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as `weights` wants it; its batch norms are folded, and its layers keep the values about as large."""
    import keras

    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNetV2(input_shape=(96, 96, 3), include_top=False, weights=None)
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights([gamma, rng.normal(0, 0.5, beta.shape), mean, variance])
    path = tmp_path_factory.mktemp("weights") / "some.weights.h5"
    network.save_weights(path)
    return path


def test_two_batches_go_through_all_stages(run_script, weights, small_fer2013, tmp_path):
    """Its model is one that the other scripts run; train.csv is enough for it; a second call trains nothing."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_bytes((small_fer2013 / "train.csv").read_bytes())
    for name in ("icml_face_data.csv", "test.csv"):
        (data / name).write_text("broken\n")
    # A graph of 160 layers is made more slowly than two of its batches are computed without one.
    (tmp_path / "sitecustomize.py").write_text("import tensorflow\ntensorflow.config.run_functions_eagerly(True)\n")
    folders = ["--data", data, "--run", tmp_path / "run", "--output", tmp_path / "model"]
    small = ["--weights", weights, "--limit", 70, "--batch-size", 32, "--epochs", 2]
    eager = {"PYTHONPATH": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = run_script("train_pretrained.py", *small, *folders, timeout=400, **eager)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("batch norms with the") == 4 and process.stdout.count("min left") == 4 * 2
    results = tmp_path / "model"
    names = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    assert names == {
        "pre_trained_model.pkl", "pre_trained_model.tflite", "pre_trained_model.json",
        "pre_trained_model_architecture.txt", "pre_trained_stages.csv",
        *(f"logs/pre_trained_{stage}.csv" for stage in ("head", "top", "all", "taught")),
    }  # fmt: skip
    report = json.loads((results / "pre_trained_model.json").read_text())
    stages = pd.read_csv(results / "pre_trained_stages.csv").set_index("stage")
    assert list(stages.index) == ["head", "top", "all", "taught"]
    assert stages.loc["taught", "validation_accuracy"] == report["validation_accuracy"]
    assert set(report["beside"]) == {"our own", "pre-trained", "average of both"} and len(report["norms"]) == 4
    text = (results / "pre_trained_model_architecture.txt").read_text(encoding="utf-8")
    assert "block_13_expand" in text and f"{report['validation_accuracy']:.1%}" in text

    images, labels = (part[:70] for part in utils.load_fer2013("train", data))
    seen = images[utils.split_validation(images, labels, 0.1, 0)[0]][..., None] * 1.0
    teacher = utils.load_model(utils.MODEL)
    said = (teacher.predict(seen, verbose=0) + teacher.predict(seen[:, :, ::-1], verbose=0)) / 2
    assert np.load(tmp_path / "run" / "taught" / "said.npy") == pytest.approx(said, abs=1e-4)

    faces = np.random.default_rng(0).integers(0, 256, (3, 48, 48)).astype(np.uint8)
    model = utils.load_model(results / "pre_trained_model.pkl")
    assert model.name == "pre_trained_model"
    expected = model.predict(faces[..., None] * 1.0, verbose=0)
    net = utils.EmotionNet(results / "pre_trained_model.tflite")
    assert net.predict(faces) == pytest.approx(expected, abs=1e-4)

    again = run_script("train_pretrained.py", *small, *folders)
    assert again.returncode == 0 and "holds these stages" in again.stdout and "min left" not in again.stdout


def test_statistics_change_nothing_that_the_network_says(pretrained_module, weights):
    """Nor does it matter afterwards whether the batch norms use those of the faces or their averages."""
    faces = np.random.default_rng(0).integers(0, 256, (48, 48, 48)).astype(np.uint8)
    views = pretrained_module.train.look(faces)
    before = pretrained_module.starting_network(weights, faces, statistics=False)
    after = pretrained_module.starting_network(weights, faces)
    after.get_layer("emotion").set_weights(before.get_layer("emotion").get_weights())
    expected = before(views, training=False).numpy()
    assert after(views, training=False).numpy() == pytest.approx(expected, abs=1e-3)
    assert after(views).numpy() == pytest.approx(expected, abs=1e-3)  # and it is not in training unless told so
    assert np.abs(before(views, training=True).numpy() - expected).max() > 0.01
    after.get_layer(index=[layer.name.startswith("dropout") for layer in after.layers].index(True)).rate = 0.0
    assert after(views, training=True).numpy() == pytest.approx(expected, abs=1e-2)


def test_frozen_layers_stay_as_they_are(pretrained_module):
    """With them their batch norms, whose averages do not move either."""
    import keras

    train = pretrained_module.train
    keras.utils.set_random_seed(0)
    model = train.build_model("residual", side=44)
    train.freeze(model, "block4a_convolution")
    before = {layer.name: layer.get_weights() for layer in model.layers if layer.weights}
    model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
    faces = np.random.default_rng(0).integers(0, 256, (8, 44, 44, 1)).astype(np.float32)
    model.train_on_batch(faces, np.eye(7)[np.arange(8) % 7])
    changed = {
        name
        for name, weights in before.items()
        if any((a != b).any() for a, b in zip(weights, model.get_layer(name).get_weights(), strict=True))
    }
    names = list(before)
    assert changed == set(names[names.index("block4a_convolution") :])


def test_weights_that_are_not_there_are_one_clear_line(run_script, small_fer2013, tmp_path):
    (tmp_path / "other.weights.h5").write_bytes(b"no weights")
    no_network = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path / "keras")}
    folders = ["--data", small_fer2013, "--run", tmp_path / "run", "--output", tmp_path / "model"]
    for value, words in [
        ("none.weights.h5", ["none.weights.h5", "imagenet"]),
        ("other.weights.h5", ["other.weights.h5 does not hold", "--weights"]),
        ("imagenet", ["could not download", "--weights"]),
    ]:
        process = run_script("train_pretrained.py", "--weights", value, *folders, **no_network)
        assert_one_clear_line(process, *words)
        assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "flag, value, word",
    [
        ("--epochs", -1, "epochs of 0 or more"),
        ("--batch-size", 0, "batch_size"),
        ("--validation-fraction", 1, "between 0 and 1"),
        ("--seed", -1, "seed -1"),
        ("--limit", 3, "3 images are too few"),
    ],
)
def test_arguments_that_make_no_sense_are_one_clear_line(run_script, small_fer2013, tmp_path, flag, value, word):
    folders = ["--data", small_fer2013, "--run", tmp_path / "run", "--output", tmp_path / "model"]
    process = run_script("train_pretrained.py", flag, value, *folders)
    assert_one_clear_line(process, word)


def test_the_other_scripts_run_the_pre_trained_model(run_script, small_fer2013, astronaut, tmp_path):
    model = utils.PRE_TRAINED_MODEL
    images, labels = utils.load_fer2013("test", small_fer2013)
    accuracy = np.mean(utils.EmotionNet(model.with_suffix(".tflite")).predict(images).argmax(axis=1) == labels)
    process = run_script("predict.py", "--model", model, "--data", small_fer2013)
    assert process.stdout == f"Accuracy on test set: {accuracy:.0%}\n", process.stderr
    process = run_script(
        "predict_live_stream.py", "--model", model.with_suffix(".tflite"), "--source", utils.CLIP, "--every", 4
    )
    assert process.returncode == 0 and "s : Happy , " in process.stdout, process.stderr
    cv2.imwrite(str(tmp_path / "smile.png"), astronaut)
    folders = ["--image", tmp_path / "smile.png", "--output", tmp_path / "hacked"]
    process = run_script("hack_the_cnn.py", "--model", model, *folders, timeout=300)
    assert process.returncode == 0, process.stderr
    hacked = cv2.imread(str(tmp_path / "hacked" / "hacked_image.png"), cv2.IMREAD_UNCHANGED)
    said = utils.load_model(model).predict(hacked[None, ..., None] * 1.0, verbose=0)[0]
    assert said[utils.EMOTIONS.index("Sad")] > 0.9
