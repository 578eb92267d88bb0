"""Does the saved model behave: its contract, its sense, and that the files beside it belong to it."""

import json
import sys

import cv2
import numpy as np
import pandas as pd
import pytest

import utils
from tests.conftest import needs_data

sys.path.insert(0, str(utils.ROOT / "scripts"))
import predict_live_stream as live_stream  # noqa: E402

FOLDER = utils.MODEL.parent
ACTED = utils.DATA / "videos" / "woman_shows_emotions.mp4"


@pytest.fixture(scope="module")
def model():
    return utils.load_model()


@pytest.fixture(scope="module")
def net():
    return utils.EmotionNet()


@pytest.fixture(scope="module")
def portraits(astronaut, hopper):
    """Crops of a smiling and of a serious woman, (2, 48, 48) uint8."""
    detector = utils.FaceDetector()
    return np.stack([utils.crop_face(frame, detector.detect(frame)[0]) for frame in (astronaut, hopper)])


def names(probabilities):
    return [utils.EMOTIONS[i] for i in probabilities.argmax(axis=1)]


@pytest.fixture(scope="module", params=[utils.MODEL, utils.PRE_TRAINED_MODEL], ids=["own", "pre_trained"])
def either(request):
    """The path of one of the two models."""
    return request.param


def test_contract(either):
    model = utils.load_model(either)
    assert model.input_shape == (None, 48, 48, 1) and model.output_shape == (None, 7)
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert all(weight.dtype == "float32" for weight in model.weights)
    faces = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 1)).astype(np.float32)
    probabilities = model.predict(faces, verbose=0)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-5) and probabilities.min() >= 0


def test_opencv_and_keras_agree(either, portraits):
    expected = utils.load_model(either)(portraits[..., None].astype(np.float32))  # which is not in training
    assert utils.EmotionNet(either.with_suffix(".tflite")).predict(portraits) == pytest.approx(expected, abs=1e-4)


def test_files_are_small_enough_to_share(either):
    for suffix in (".pkl", ".tflite"):
        assert either.with_suffix(suffix).stat().st_size < 25e6


def test_a_smile_is_happy_and_a_serious_face_is_not(either, portraits):
    smiling, serious = names(utils.EmotionNet(either.with_suffix(".tflite")).predict(portraits))
    assert smiling == "Happy" and serious != "Happy"


@pytest.mark.parametrize("gain, offset", [(0.7, 0), (1.0, 25), (1.2, -20)])
def test_a_smile_stays_happy_in_other_light(net, portraits, gain, offset):
    changed = np.clip(portraits[:1] * gain + offset, 0, 255).astype(np.uint8)
    assert names(net.predict(changed)) == ["Happy"]


@pytest.mark.skipif(not ACTED.is_file(), reason=f"{ACTED} is not there: see data/README.md")
def test_an_actress_is_read_as_she_plays(net):
    """In a real video of a woman who cries, is startled and laughs, in this order, each is held without a break."""
    runs = []  # of [emotion, seconds]
    since = 0.0
    for seconds, _, faces in live_stream.analyse(utils.Video(ACTED), utils.FaceDetector(), net):
        emotion = utils.EMOTIONS[faces[0][2].argmax()] if faces else None
        if not runs or runs[-1][0] != emotion:
            runs.append([emotion, 0.0])
            since = seconds
        runs[-1][1] = seconds - since
    held = [(emotion, length) for emotion, length in runs if length > 1]
    assert [emotion for emotion, _ in held] == ["Sad", "Fear", "Happy"]
    assert min(length for _, length in held) > 2


def test_a_mirrored_face_feels_the_same(net, portraits):
    mirrored = np.stack([cv2.flip(face, 1) for face in portraits])
    assert np.abs(net.predict(mirrored) - net.predict(portraits)).max() < 0.25


def test_the_report_beside_the_model_is_about_it(model):
    report = json.loads(utils.MODEL.with_suffix(".json").read_text())
    assert report["parameters"] == model.count_params()
    assert report["train_images"] + report["validation_images"] == 28_709
    text = (FOLDER / "my_own_model_architecture.txt").read_text(encoding="utf-8")
    assert f"{model.count_params():,}" in text
    iterations = pd.read_csv(FOLDER / "iterations.csv").set_index("iteration")
    assert iterations.loc["final", "validation_accuracy"] == report["validation_accuracy"]
    for name, row in iterations.iterrows():
        log = pd.read_csv(FOLDER / "logs" / f"{name}.csv")
        best = log.loc[log["epoch"] == row["best_epoch"] - 1].iloc[0]
        assert len(log) == row["epochs_trained"]
        if not row["clean_norms"]:  # else the model that is kept is none of those that the log knows
            assert best["val_accuracy"] == pytest.approx(row["validation_accuracy"], abs=0.01)
        assert f"{row['validation_accuracy']:.1%}" in text
    assert "TODO" not in text


@pytest.mark.parametrize("column", ["taught", "final"])
def test_training_stopped_before_it_overfitted(column):
    """The validation loss ended near its lowest in every cycle, and from one end of a cycle to the next hardly rose."""
    log = pd.read_csv(FOLDER / "logs" / f"{column}.csv")
    row = pd.read_csv(FOLDER / "iterations.csv").set_index("iteration").loc[column]
    cycle = row["epochs"] // row["cycles"]
    cycles = [log["val_loss"].iloc[first : first + cycle] for first in range(0, len(log), cycle)]
    assert len(cycles) == row["cycles"]
    for losses in cycles:
        assert len(losses) == cycle and losses.iloc[-1] - losses.min() < 0.02
    ends = [losses.iloc[-1] for losses in cycles]
    assert ends[-1] - min(ends) < 0.02


def test_the_network_of_two_columns_has_a_lower_loss_on_validation_than_either():
    """And batch norms of plain faces, the view of whole faces and kernels of lower rank cost next to nothing."""
    report = json.loads(utils.MODEL.with_suffix(".json").read_text())
    new, other = (report["made_of"][name] for name in ("this run's column alone", "that of taught alone"))
    training_norms = report["made_of"]["batch norms of the training"]
    for column in (new, other):
        assert report["validation_cross_entropy"] < column["validation_cross_entropy"]
    assert new["validation_cross_entropy"] < training_norms["validation_cross_entropy"] + 0.001
    for other_way, cost in (("with the view of the training", 0.001), ("with kernels of full rank", 0.002)):
        figure = report["made_of"][other_way]["validation_cross_entropy"]
        assert report["validation_cross_entropy"] < figure + cost
    iterations = pd.read_csv(FOLDER / "iterations.csv").set_index("iteration")
    assert iterations.loc["taught", "validation_accuracy"] == other["validation_accuracy"]
    same_faces = iterations[iterations["validation_images"] == iterations.loc["final", "validation_images"]]
    assert same_faces["validation_cross_entropy"].idxmin() == "final"


def test_the_pre_trained_model_has_its_report_and_what_is_kept_is_the_best_on_validation():
    report = json.loads(utils.PRE_TRAINED_MODEL.with_suffix(".json").read_text())
    assert report["parameters"] == utils.load_model(utils.PRE_TRAINED_MODEL).count_params()
    assert report["train_images"] + report["validation_images"] == 28_709
    stages = pd.read_csv(FOLDER / "pre_trained_stages.csv").set_index("stage")
    assert list(stages.index) == ["head", "top", "all", "taught"]
    assert stages["validation_accuracy"].is_monotonic_increasing
    assert stages.loc["taught", "validation_accuracy"] == report["validation_accuracy"]
    text = (FOLDER / "pre_trained_model_architecture.txt").read_text(encoding="utf-8")
    for stage, row in stages.iterrows():
        assert len(pd.read_csv(FOLDER / "logs" / f"pre_trained_{stage}.csv")) == row["epochs_trained"]
        assert f"{row['validation_accuracy']:.1%}" in text
    own = json.loads(utils.MODEL.with_suffix(".json").read_text())
    for name, other in (("pre-trained", report), ("our own", own)):  # the comparison is of the models that are here
        for figure in ("validation_accuracy", "validation_cross_entropy"):
            assert report["beside"][name][figure] == pytest.approx(other[figure], abs=2e-4)
    beside = {name: figures["validation_accuracy"] for name, figures in report["beside"].items()}
    assert max(beside, key=beside.get) == "our own"  # else the average would be worth its price


def test_the_figures_are_not_worse_than_they_were():
    evaluation = json.loads((utils.RESULTS / "evaluation.json").read_text())
    assert evaluation["accuracy"]["all of the test set"]["value"] > 0.70
    assert evaluation["accuracy"]["PrivateTest"]["value"] > 0.70
    assert evaluation["calibration error"] < 0.02
    assert evaluation["beside"]["pre-trained"]["value"] > 0.67
    assert set(evaluation["robustness"]) == {"blur", "noise", "darkness", "low resolution", "JPEG", "shift"}


@needs_data
def test_validation_accuracy_is_the_one_that_was_reported(either):
    report = json.loads(either.with_suffix(".json").read_text())
    images, labels = utils.load_fer2013("train")
    arguments = report["arguments"]
    _, validation = utils.split_validation(images, labels, arguments["validation_fraction"], arguments["seed"])
    part = validation[:500]
    net = utils.EmotionNet(either.with_suffix(".tflite"))
    accuracy = np.mean(net.predict(images[part]).argmax(axis=1) == labels[part])
    assert accuracy == pytest.approx(report["validation_accuracy"], abs=0.07)  # three standard errors of 500
