"""`python scripts/preprocess.py`, as a user runs it."""

import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import utils
from tests.code.test_video import numbered_frames
from tests.conftest import assert_one_clear_line, needs_yunet

SCRIPT = "preprocess.py"


def read_images(folder):
    names = sorted((path.name for path in folder.glob("*.png")), key=lambda name: int(name[5:-4]))
    return names, [cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED) for name in names]


@pytest.fixture(scope="module")
def faces_of_the_clip(tmp_path_factory):
    """The folder into which the script wrote the faces of the bundled clip."""
    folder = tmp_path_factory.mktemp("clip") / "faces"
    command = [sys.executable, utils.ROOT / "scripts" / SCRIPT, "--output", folder]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder


def test_the_clip_becomes_twenty_centred_faces(faces_of_the_clip, tmp_path):
    names, images = read_images(faces_of_the_clip)
    assert names == [f"image{i}.png" for i in range(len(names))]
    assert len(names) in (20, 21)
    # A detector that did not make the crops looks at them: each must hold a face, in the middle.
    haar = utils.FaceDetector(tmp_path / "missing.onnx")
    found = 0
    for image in images:
        assert image.shape == (48, 48) and image.dtype == np.uint8
        scene = cv2.copyMakeBorder(cv2.resize(image, (192, 192)), 60, 60, 60, 60, cv2.BORDER_REPLICATE)
        for face in haar.detect(scene)[:1]:
            assert abs(face.x - 156) < 40 and abs(face.y - 156) < 40
            found += 1
    assert found >= 0.8 * len(images)


@needs_yunet  # which made them
def test_the_committed_images_are_those_of_the_committed_clip(faces_of_the_clip):
    names, images = read_images(faces_of_the_clip)
    committed_names, committed = read_images(utils.CLIP.parent)
    assert names == committed_names
    for image, other in zip(images, committed, strict=True):
        assert np.abs(image.astype(int) - other).mean() < 2  # decoders differ by a grey value or two


def test_a_second_without_a_face_borrows_and_says_so(run_script, write_video, astronaut, tmp_path):
    face, wall = cv2.resize(astronaut, (320, 320)), np.full((320, 320, 3), 90, np.uint8)
    frames = [wall if 52 <= i <= 71 else face for i in range(210)]  # none from 5.2 to 7.1 s
    process = run_script(SCRIPT, "--source", write_video(frames, fps=10), "--output", tmp_path / "faces")
    assert process.returncode == 0, process.stderr
    assert len(read_images(tmp_path / "faces")[0]) == 21
    assert "image6.png: 5.10 s (no whole face at 6 s: taken from 5.10 s)" in process.stdout
    assert "image7.png: 7.20 s (no whole face at 7 s: taken from 7.20 s)" in process.stdout
    assert process.stdout.count("no whole face") == 2


def test_a_face_cut_by_the_edge_waits_for_a_whole_one(run_script, write_video, astronaut, tmp_path):
    whole = cv2.resize(astronaut, (320, 320))
    cut = whole[:, 135:]  # half of her face is left
    cut = cv2.copyMakeBorder(cut, 0, 0, 0, 135, cv2.BORDER_REPLICATE)
    frames = [cut if 98 <= i <= 111 else whole for i in range(210)]
    process = run_script(SCRIPT, "--source", write_video(frames, fps=10), "--output", tmp_path / "faces")
    assert "image10.png: 9.70 s (no whole face at 10 s: taken from 9.70 s)" in process.stdout, process.stderr
    _, images = read_images(tmp_path / "faces")
    assert np.abs(images[10].astype(int) - images[5]).mean() < 3


def test_too_few_faces_is_an_error_and_leaves_the_old_set_whole(run_script, write_video, astronaut, tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for i in range(21):
        (folder / f"image{i}.png").write_bytes(b"old")
    face = cv2.resize(astronaut, (320, 320))
    for frames in ([face] * 50, [np.zeros_like(face)] * 210):
        process = run_script(SCRIPT, "--source", write_video(frames, fps=10), "--output", folder)
        assert_one_clear_line(process, "video.mp4", "expected 20")
        assert [path.read_bytes() for path in folder.iterdir()] == [b"old"] * 21


def test_an_error_halfway_puts_the_old_set_back(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"image{i}.png").write_bytes(b"old")
    replace, calls = Path.replace, []

    def fail_once(path, target):
        calls.append(path)
        if len(calls) == 2:  # one new one is there
            raise OSError("disk full")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(OSError, match="disk full"):
        runpy.run_path(str(utils.ROOT / "scripts" / SCRIPT))["write_images"](np.zeros((3, 48, 48), np.uint8), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {f"image{i}.png": b"old" for i in range(3)}


def test_a_shorter_set_leaves_nothing_of_a_longer_one(run_script, write_video, astronaut, tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    (folder / "image20.png").write_bytes(b"old")
    (folder / "input_video.mp4").write_bytes(b"not an image")
    (folder / "image_of_my_cat.png").write_bytes(b"not ours")
    (folder / "image1234.png").write_bytes(b"not ours")  # as a camera names its pictures
    frames = [cv2.resize(astronaut, (320, 320))] * 196  # 19.6 s
    assert run_script(SCRIPT, "--source", write_video(frames, fps=10), "--output", folder).returncode == 0
    for name in ("image_of_my_cat.png", "image1234.png"):
        assert (folder / name).read_bytes() == b"not ours"
        (folder / name).unlink()
    assert len(read_images(folder)[0]) == 20
    assert (folder / "input_video.mp4").read_bytes() == b"not an image"


def test_pictures_of_the_user_that_have_such_names_are_kept(run_script, write_video, astronaut, tmp_path):
    video = write_video([cv2.resize(astronaut, (320, 320))] * 210, fps=10)
    picture = tmp_path / "image20.png"
    cv2.imwrite(str(picture), astronaut)
    before = picture.read_bytes()
    assert_one_clear_line(run_script(SCRIPT, "--source", video, "--output", tmp_path), "image20.png", "--output")
    assert picture.read_bytes() == before
    assert not (tmp_path / "image0.png").exists()
    picture.unlink()
    picture.mkdir()
    assert_one_clear_line(run_script(SCRIPT, "--source", video, "--output", tmp_path), "cannot write", "image20.png")


def test_what_is_no_video_is_one_clear_line(run_script, tmp_path, write_video):
    (tmp_path / "text.mp4").write_text("no video")
    assert_one_clear_line(run_script(SCRIPT, "--source", tmp_path / "text.mp4"), "text.mp4", "not a video")
    one_pixel = write_video([frame[:2, :2] for frame in numbered_frames(5)], name="pixel.mp4")
    assert_one_clear_line(run_script(SCRIPT, "--source", one_pixel), "pixel.mp4")


def test_a_video_among_the_images_is_not_replaced(run_script, write_video, astronaut, tmp_path):
    video = write_video([cv2.resize(astronaut, (320, 320))] * 210, fps=10).rename(tmp_path / "image3.png")
    before = video.read_bytes()
    assert_one_clear_line(run_script(SCRIPT, "--source", video, "--output", tmp_path), "image3.png", "another name")
    assert video.read_bytes() == before
