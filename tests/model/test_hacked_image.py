"""What hack_the_cnn.py left in results/hack_cnn: is it what the notebook says, and as little as was promised?"""

import json

import cv2
import numpy as np

import utils

FOLDER = utils.RESULTS / "hack_cnn"


def read(name):
    return cv2.imread(str(FOLDER / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def test_the_hacked_image_is_sad_and_looks_happy():
    first, second = read("input_image"), read("hacked_image")
    assert first.shape == second.shape == (48, 48) and first.dtype == second.dtype == np.uint8
    before, after = utils.EmotionNet().predict(np.stack([first, second]))
    assert before[utils.EMOTIONS.index("Happy")] > 0.9
    assert after[utils.EMOTIONS.index("Sad")] > 0.9
    change = np.abs(first.astype(int) - second)
    assert 0 < change.max() <= 4 and change.mean() < 1.5


def test_the_study_is_about_these_images():
    report = json.loads((FOLDER / "metrics.json").read_text())
    first, second = read("input_image"), read("hacked_image")
    change = np.abs(first.astype(int) - second)
    assert report["largest change"] == change.max() and abs(report["mean change"] - change.mean()) < 1e-3
    assert report["faces"] == 500
    fgsm, pgd = report["shares"]["fgsm"], report["shares"]["pgd"]
    assert pgd["8"] > 0.9 and all(pgd[limit] >= fgsm[limit] for limit in pgd)
    assert report["smallest change"]["found"] > 0.9
    assert report["survival"]["as it is in the file"]["hacked: Sad"] == 1
    assert {"photo, detector, crop", "JPEG, quality 50", "shift by half a pixel"} <= report["survival"].keys()
    readme = (utils.ROOT / "README.md").read_text(encoding="utf-8")
    assert f"changed by {change.max()} of 255 grey values at most" in readme
    photo = "photo, detector, crop"  # of which the README speaks
    assert report["survival"][photo]["hacked: Sad"] < 0.5
    assert report["survival at 8, found for many views"][photo]["hacked: Sad"] > 0.95
    before, after = report["defence"]["before"], report["defence"]["after"]
    assert after["Happy faces made Sad by up to 2"] < before["Happy faces made Sad by up to 2"]
