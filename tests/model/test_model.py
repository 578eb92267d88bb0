"""Does the saved model behave: its contract, its sense, and that the files beside it belong to it."""

import json
import re

import cv2
import numpy as np
import pytest

import utils
from tests.conftest import needs_data, needs_yunet

FOLDER = utils.MODEL.parent
ACTED = utils.DATA / "videos" / "woman_shows_emotions.mp4"


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


@pytest.fixture(scope="module")
def model(either):
    return utils.load_model(either)


def test_contract(model):
    assert model.input_shape == (None, 48, 48, 1) and model.output_shape == (None, 7)
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert all(weight.dtype == "float32" for weight in model.weights)
    faces = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 1)).astype(np.float32)
    probabilities = model.predict(faces, verbose=0)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-5) and probabilities.min() >= 0


def test_opencv_and_keras_agree(either, model, portraits):
    expected = model(portraits[..., None].astype(np.float32))  # which is not in training
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
    for seconds, _, faces in utils.analyse(utils.Video(ACTED), utils.FaceDetector(), net):
        emotion = utils.EMOTIONS[faces[0][2].argmax()] if faces else None
        if not runs or runs[-1][0] != emotion:
            runs.append([emotion, 0.0])
            since = seconds
        runs[-1][1] = seconds - since
    held = [(emotion, length) for emotion, length in runs if length > 1]
    assert [emotion for emotion, _ in held] == ["Sad", "Fear", "Happy"]
    assert min(length for _, length in held) > 2


@needs_yunet  # whose crops are centred alike
def test_a_mirrored_face_feels_the_same(net, portraits):
    mirrored = np.stack([cv2.flip(face, 1) for face in portraits])
    assert np.abs(net.predict(mirrored) - net.predict(portraits)).max() < 0.25


def test_the_report_beside_the_model_is_about_it(either, model):
    report = json.loads(either.with_suffix(".json").read_text())
    count = model.count_params()
    assert report["parameters"] == count
    assert report["train_images"] + report["validation_images"] == 28_709
    text = either.with_name(f"{either.stem}_architecture.txt").read_text(encoding="utf-8")
    assert f"{count:,}" in text and f"{report['validation_accuracy']:.1%}" in text


def numbers(value):
    """Return every number in what a JSON file holds."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def test_the_model_card_and_the_readme_say_what_the_results_hold():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    evaluation = json.loads((utils.RESULTS / "evaluation.json").read_text())
    report = json.loads(utils.MODEL.with_suffix(".json").read_text())
    known = {f"{number:.1%}" for number in numbers(evaluation) + numbers(report)}
    assert {*re.findall(r"\d+\.\d%", card)} <= known, "the card is out of date: run `make notebooks`"
    readme, cut = (utils.ROOT / "README.md").read_text(encoding="utf-8"), evaluation["accuracy"]["all of the test set"]
    assert f"It is right on {cut['value']:.1%} of {cut['images']:,} test faces" in readme
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in card.splitlines() if line.startswith("| ")}
    for name, cut in evaluation["accuracy"].items():
        share = f"{cut['value']:.1%} ({cut['low']:.1%} to {cut['high']:.1%})"
        assert share in rows[name]
        if name in ("all of the test set", "PrivateTest"):
            assert f"| {share} |" in readme, "the README is out of date: run `make notebooks`"
    for name, some in evaluation["emotions"].items():
        recall = f"{some['recall']:.1%} ({some['recall from']:.1%} to {some['recall to']:.1%})"
        assert f"{some['images']:,} | {recall} | {some['precision']:.1%} | {some['f1']:.1%}" in rows[name]
    for name, some in evaluation["robustness"].items():
        steps = " | ".join(f"{step}: {share:.1%}" for step, share in some["accuracy"].items())
        assert steps in rows[f"{name} ({some['unit']})"]
    assert f"{report['parameters']:,} parameters" in card and f"{report['epochs_trained']} epochs" in card


@needs_data
def test_validation_accuracy_is_the_one_that_was_reported(either):
    report = json.loads(either.with_suffix(".json").read_text())
    images, labels = utils.load_fer2013("train")
    _, validation = utils.split_validation(images, labels)
    part = validation[:500]
    net = utils.EmotionNet(either.with_suffix(".tflite"))
    accuracy = np.mean(net.predict(images[part]).argmax(axis=1) == labels[part])
    assert accuracy == pytest.approx(report["validation_accuracy"], abs=0.07)  # three standard errors of 500
