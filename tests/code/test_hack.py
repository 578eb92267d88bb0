"""`python scripts/hack_the_cnn.py`: its attacks keep their word, and what it is given is used or refused clearly."""

import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import utils
from tests.conftest import assert_one_clear_line, load_script, needs_yunet

SAD = utils.EMOTIONS.index("Sad")


@pytest.fixture(scope="module")
def hack_module():
    """scripts/hack_the_cnn.py as a module."""
    return load_script("hack_the_cnn")


@pytest.fixture
def hack(run_script, tmp_path):
    def run(*arguments):
        return run_script("hack_the_cnn.py", "--output", tmp_path / "hacked", *arguments)

    return run


@pytest.fixture
def smile(astronaut, tmp_path):
    """A file with the astronaut's portrait."""
    path = tmp_path / "smile.png"
    cv2.imwrite(str(path), astronaut)
    return path


def test_the_gradient_is_that_of_the_loss(hack_module, build_small_model):
    """Where a pixel is moved a little, the loss moves by gradient times distance."""
    network = build_small_model()
    face = np.random.default_rng(0).integers(50, 200, (1, 48, 48)).astype(np.float32)
    gradient, before = hack_module.loss_gradient(network, face, SAD)
    direction = np.sign(gradient) * 0.5
    _, after = hack_module.loss_gradient(network, face + direction, SAD)
    rise = np.log(before[0, SAD]) - np.log(after[0, SAD])
    assert rise == pytest.approx((gradient * direction).sum(), rel=0.1)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@pytest.mark.parametrize("epsilon", [1, 2, 8])
def test_attacks_stay_within_epsilon_and_0_to_255(hack_module, build_small_model, name, epsilon):
    faces = np.random.default_rng(0).integers(0, 256, (5, 48, 48)).astype(np.uint8)
    faces[0], faces[1] = 0, 255  # nothing may wrap around
    network = build_small_model()
    hacked = getattr(hack_module, name)(network, faces, SAD, epsilon)
    assert hacked.dtype == np.uint8 and hacked.shape == faces.shape
    assert 0 < np.abs(hacked.astype(int) - faces).max() <= epsilon
    _, before = hack_module.loss_gradient(network, faces, SAD)
    _, after = hack_module.loss_gradient(network, hacked, SAD)
    assert (after[:, SAD] > before[:, SAD]).all()


def test_changes_that_are_not_needed_are_taken_back(hack_module, build_small_model):
    network = build_small_model()
    face = np.random.default_rng(0).integers(50, 200, (1, 48, 48)).astype(np.uint8)
    hacked = hack_module.pgd(network, face, SAD, 8)
    start, most = (hack_module.loss_gradient(network, faces, SAD)[1][0, SAD] for faces in (face, hacked))
    least = (start + most) / 2
    spared = hack_module.spare(network, face[0], hacked[0], SAD, least)
    assert hack_module.loss_gradient(network, spared[None], SAD)[1][0, SAD] > least
    assert 0 < (spared != face[0]).sum() < (hacked != face).sum()
    assert ((spared == face[0]) | (spared == hacked[0])).all()


def test_a_smile_becomes_sad(hack, smile, tmp_path):
    process = hack("--image", smile, "--target", "Sad")
    assert process.returncode == 0, process.stderr
    first, second = (cv2.imread(str(tmp_path / "hacked" / f"{name}_image.png"), -1) for name in ("input", "hacked"))
    assert first.shape == second.shape == (48, 48) and first.dtype == second.dtype == np.uint8
    before, after = utils.EmotionNet().predict(np.stack([first, second]))  # another program than the one attacked
    assert utils.EMOTIONS[before.argmax()] == "Happy" and after.argmax() == SAD and after[SAD] > 0.89
    change = np.abs(first.astype(int) - second)
    assert 0 < change.max() <= 8
    assert f"by more than {change.max()} of 255, on average by {change.mean():.2f}" in process.stdout
    assert f"hacked_image.png: Sad, {after[SAD]:.0%}" in process.stdout


def test_a_small_picture_in_colour_is_taken_as_the_face(hack, smile, astronaut, tmp_path):
    face = utils.crop_face(astronaut, utils.FaceDetector().detect(astronaut)[0])
    path = tmp_path / "small.png"
    cv2.imwrite(str(path), np.stack([face] * 3, axis=-1))
    process = hack("--image", path, "--target", "Neutral")
    assert process.returncode == 0, process.stderr
    assert (cv2.imread(str(tmp_path / "hacked" / "input_image.png"), -1) == face).all()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--target", "Happy"], ["'Happy'", "Sad"]),
        (["--target", "Sleepy"], ["'Sleepy'", "Sad"]),
        (["--epsilon", 0], ["epsilon is 0", "1 to 255"]),
        (["--image", "nowhere.png"], ["no picture at nowhere.png"]),
    ],
)
def test_arguments_that_make_no_sense_are_one_clear_line(hack, tmp_path, arguments, words):
    assert_one_clear_line(hack(*arguments), *words)
    assert not (tmp_path / "hacked").exists()


def test_a_picture_without_a_happy_face_is_one_clear_line(hack, hopper, tmp_path):
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), np.full((200, 300, 3), 90, np.uint8))
    assert_one_clear_line(hack("--image", path), "no face", path)
    cv2.imwrite(str(path), hopper)
    assert_one_clear_line(hack("--image", path), "expected one that it calls Happy")
    path.write_text("not a picture")
    assert_one_clear_line(hack("--image", path), "no picture at")
    assert not (tmp_path / "hacked").exists()


def test_too_small_an_epsilon_says_how_far_it_came(hack_module, smile, tmp_path, monkeypatch):
    monkeypatch.setattr(hack_module, "SURE", 2.0)  # which no probability is
    arguments = vars(hack_module.parse_args(["--image", str(smile), "--epsilon", "2"]))
    with pytest.raises(utils.InputError, match="up to 2 grey values the CNN says Sad with .* at most.*allow more"):
        hack_module.main(**arguments | {"output": str(tmp_path / "hacked")})
    assert not (tmp_path / "hacked").exists()


def test_without_a_picture_it_takes_faces_that_are_happy(hack_module, small_fer2013, tmp_path, monkeypatch):
    """Test faces that are labelled Happy and surely so to the network; the astronaut where there are none."""

    class Network:
        def __init__(self, happy):
            self.happy = happy

        def predict(self, faces, **options):
            return np.tile(np.eye(7)[hack_module.HAPPY] * self.happy, (len(faces), 1))

    images, labels = utils.load_fer2013("test", small_fer2013)
    chosen = hack_module.happy_faces(Network(1.0), small_fer2013, most=4)
    assert (chosen == images[labels == hack_module.HAPPY][:4]).all()
    with pytest.raises(utils.InputError, match="no test face that is labelled Happy"):
        hack_module.happy_faces(Network(0.5), small_fer2013)
    monkeypatch.setattr(utils, "DATA", tmp_path)
    (smile,) = hack_module.happy_faces(Network(0.5))
    assert utils.EMOTIONS[utils.EmotionNet().predict(smile[None])[0].argmax()] == "Happy"
    with pytest.raises(utils.InputError, match="no test set in"):
        hack_module.happy_faces(Network(1.0), tmp_path)


@needs_yunet
def test_a_phone_held_upright_is_understood(hack_module, astronaut, tmp_path):
    """A JPEG that is stored lying down and says so is turned as every viewer turns it."""
    from PIL import Image

    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be shown turned right by a quarter
    Image.fromarray(np.rot90(astronaut[..., ::-1]).copy()).save(path, exif=exif, quality=95)
    straight = tmp_path / "straight.png"
    cv2.imwrite(str(straight), astronaut)
    faces = [hack_module.read_face(picture).astype(int) for picture in (path, straight)]
    assert np.abs(faces[0] - faces[1]).mean() < 8


def test_a_sixteen_bit_picture_is_read(hack_module, astronaut, tmp_path):
    path = tmp_path / "deep.png"
    cv2.imwrite(str(path), astronaut.astype(np.uint16) * 257)
    assert hack_module.read_face(path).std() > 20


def test_the_picture_that_is_hacked_is_not_overwritten(hack, smile, astronaut, tmp_path):
    path = tmp_path / "hacked" / "input_image.png"
    path.parent.mkdir()
    cv2.imwrite(str(path), astronaut)
    before = path.read_bytes()
    assert_one_clear_line(hack("--image", path), "input_image.png", "another name")
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf_8_is_one_clear_line(hack, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(path)).write_bytes(b"picture")
    process = hack("--image", path.decode(errors="surrogateescape"))
    assert process.returncode == 1 and "not UTF-8" in process.stderr
