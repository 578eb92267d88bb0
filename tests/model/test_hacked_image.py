"""What hack_the_cnn.py left in results/hack_cnn: is it what the notebook and the README say?"""

import json
import re

import cv2
import numpy as np

import utils
from tests.conftest import load_script, needs_test_set

FOLDER = utils.RESULTS / "hack_cnn"


def read(name):
    return cv2.imread(str(FOLDER / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def read_report():
    return json.loads((FOLDER / "metrics.json").read_text())


def test_the_hacked_image_is_sad_and_looks_happy():
    first, second = read("input_image"), read("hacked_image")
    assert first.shape == second.shape == (48, 48) and first.dtype == second.dtype == np.uint8
    before, after = utils.EmotionNet().predict(np.stack([first, second]))
    assert before[utils.EMOTIONS.index("Happy")] > 0.9
    assert after[utils.EMOTIONS.index("Sad")] > 0.9
    change = np.abs(first.astype(int) - second)
    assert 0 < change.max() <= load_script("hack_the_cnn").parse_args([]).epsilon


@needs_test_set
def test_the_face_is_one_of_the_plainest_smiles():
    plain = load_script("hack_the_cnn").happy_faces("", read_report()["limit"])
    assert (plain == read("input_image")).all(axis=(1, 2)).any()


def test_the_study_is_about_these_images():
    report, change = read_report(), np.abs(read("input_image").astype(int) - read("hacked_image"))
    assert report["largest change"] == change.max() and abs(report["mean change"] - change.mean()) < 1e-3
    assert 0 < report["faces"] <= report["limit"]
    images, numbers = {"target", "probability before", "probability after"}, {"largest change", "mean change"}
    assert report.keys() == images | numbers | {"limit", "faces", "shares", "survival"}


def test_the_readme_says_what_was_measured():
    text = (utils.ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"## How little it takes to fool it\n(.*?)\n!\[", text, re.DOTALL)[1]
    told = " ".join(re.sub(r"\(.*?\)", "", section).split())
    assert re.findall(r"\d+", told.replace("08_adversarial_hack", "")) == ["255"]  # no figure that a run may change
    report = read_report()
    assert "by a few of 255 grey values at most" in told and report["largest change"] <= 8
    assert "Many small steps along it make more faces Sad than one step of the same size" in told
    one, many = report["shares"]["one step (FGSM)"], report["shares"]["many steps (PGD)"]
    assert all(many[most] >= one[most] for most in many) and sum(many.values()) > sum(one.values())
    assert "the detector and the crop undo the trick for some faces, and not for all" in told
    photo = report["survival"]["photo, detector, crop"]
    shares = [share for label, share in photo.items() if label.startswith("Sad") and share is not None]
    assert min(shares) < 1 and max(shares) > 0
