"""Faces are found, framed as FER2013's, and followed; strange frames do no harm."""

import cv2
import numpy as np
import pytest

import utils
from tests.conftest import needs_yunet

DETECTORS = [pytest.param("YuNet", marks=needs_yunet), "Haar"]


@pytest.fixture(params=DETECTORS)
def detector(request, tmp_path):
    return utils.FaceDetector(None if request.param == "YuNet" else tmp_path / "missing.onnx")


@pytest.mark.parametrize("convert", [None, cv2.COLOR_BGR2GRAY, cv2.COLOR_BGR2BGRA])
def test_finds_the_face_in_colour_grey_and_bgra(detector, astronaut, convert):
    frame = astronaut if convert is None else cv2.cvtColor(astronaut, convert)
    face = detector.detect(frame)[0]
    assert abs(face.x - 223) < 12 and abs(face.y - 115) < 15
    assert 90 < face.side < 150
    assert utils.crop_face(frame, face).shape == (48, 48)


def test_both_detectors_frame_a_face_alike(astronaut, hopper, tmp_path):
    if not utils.YUNET.is_file():
        pytest.skip("YuNet is not there: `make data` downloads it")
    haar = utils.FaceDetector(tmp_path / "missing.onnx")
    for frame in (astronaut, hopper):
        a, b = utils.FaceDetector().detect(frame)[0], haar.detect(frame)[0]
        assert a.side / b.side == pytest.approx(1, abs=0.3)
        assert np.hypot(a.x - b.x, a.y - b.y) < 0.15 * a.side


def test_finds_faces_at_the_same_place_in_a_4k_frame(detector, astronaut):
    small = detector.detect(cv2.copyMakeBorder(astronaut, 0, 0, 0, 398, cv2.BORDER_REPLICATE))[0]
    frame = cv2.resize(astronaut, (2160, 2160))
    large = detector.detect(cv2.copyMakeBorder(frame, 0, 0, 0, 1680, cv2.BORDER_REPLICATE))[0]
    assert (large.x, large.y, large.side) == pytest.approx(
        (small.x * 2160 / 512, small.y * 2160 / 512, small.side * 2160 / 512), rel=0.1
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (1, 5000, 3), (23, 29, 3), (64, 64, 4)])
def test_frames_too_small_for_a_face_have_none(detector, shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert detector.detect(rng.integers(0, 256, shape).astype(np.uint8)) == []


@pytest.mark.parametrize(
    "frame", [np.zeros((9, 9)), np.zeros((0, 5, 3), np.uint8), np.zeros((9, 9, 2), np.uint8), None]
)
def test_what_is_no_picture_is_refused(detector, frame):
    with pytest.raises(utils.InputError, match="expected"):
        detector.detect(frame)


@needs_yunet
def test_boxes_of_unset_memory_are_dropped(astronaut, monkeypatch):
    detector = utils.FaceDetector()
    real = detector._detect_yunet(astronaut)
    junk = np.array([[4e30, 4e30, 0, 0.9], [np.nan, 1, 50, 0.9], [np.inf, 5, 9, 1], [100, 100, -3, 1], [-5, 20, 40, 1]])
    monkeypatch.setattr(detector, "_detect_yunet", lambda frame: np.vstack([junk, real]))
    assert len(detector.detect(astronaut)) == len(real) == 1


def test_a_broken_yunet_file_is_named(tmp_path):
    path = tmp_path / "yunet.onnx"
    path.write_bytes(b"not a network" * 100)
    with pytest.raises(utils.InputError, match="yunet.onnx.*make data"):
        utils.FaceDetector(path)


def test_a_crop_is_centred_and_as_large_as_the_face():
    frame = np.zeros((200, 300, 3), np.uint8)
    cv2.circle(frame, (150, 100), 24, (255, 255, 255), cv2.FILLED)
    crop = utils.crop_face(frame, utils.Face(150, 100, 96))
    y, x = np.nonzero(crop > 127)
    assert (x.mean(), y.mean()) == pytest.approx((23.5, 23.5), abs=0.6)
    assert np.ptp(x) + 1 == pytest.approx(24, abs=1)  # 48 of 96 pixels, and so 24 of 48


def test_shrinking_averages_instead_of_picking_pixels():
    frame = np.indices((480, 480)).sum(axis=0) % 2 * 255  # a chess board of single pixels
    crop = utils.crop_face(frame.astype(np.uint8), utils.Face(240, 240, 480))
    assert np.all(np.abs(crop.astype(int) - 127) <= 1)


@pytest.mark.parametrize("x, y", [(0, 0), (99, 0), (0, 79), (99, 79), (50, 40)])
def test_a_face_cut_by_the_edge_is_continued_from_the_edge(x, y):
    frame = np.full((80, 100, 3), 77, np.uint8)
    crop = utils.crop_face(frame, utils.Face(x, y, 60))
    assert crop.shape == (48, 48) and np.all(crop == 77)


def ids(tracker, faces, time):
    return [track.id for track in tracker.update([utils.Face(x, y, side) for x, y, side in faces], time)]


def test_a_face_keeps_its_id_while_it_moves_and_comes_nearer():
    tracker = utils.FaceTracker()
    for i in range(100):
        assert ids(tracker, [(100 + 4 * i, 200 + 50 * np.sin(i / 9), 80 + i)], i / 25) == [1]


def test_a_face_that_is_covered_for_a_moment_keeps_its_id():
    tracker = utils.FaceTracker()
    for i in range(25):
        ids(tracker, [(100 + 2 * i, 200, 80)], i / 25)
    for i in range(25, 45):
        assert ids(tracker, [], i / 25) == []
    assert ids(tracker, [(175, 200, 80)], 45 / 25) == [1]


def test_a_face_that_was_long_away_gets_a_new_id():
    tracker = utils.FaceTracker()
    ids(tracker, [(100, 200, 80)], 0.0)
    assert ids(tracker, [(100, 200, 80)], 5.0) == [2]


def test_another_face_that_comes_in_first_in_the_list_does_not_take_the_id():
    tracker = utils.FaceTracker()
    ids(tracker, [(100, 200, 80)], 0.0)
    assert ids(tracker, [(300, 200, 120), (102, 200, 80)], 0.04) == [2, 1]
    assert ids(tracker, [(104, 200, 80), (300, 200, 120)], 0.08) == [1, 2]


def test_two_faces_that_pass_each_other_keep_their_ids():
    tracker = utils.FaceTracker()
    for i in range(80):
        left, right = (100 + 5 * i, 200, 80), (500 - 5 * i, 205, 90)
        hidden = abs(left[0] - right[0]) < 60  # the nearer, larger one covers the other
        assert ids(tracker, [right] if hidden else [right, left], i / 25) == ([1] if hidden else [1, 2])


def test_a_face_far_away_is_another_face():
    tracker = utils.FaceTracker()
    ids(tracker, [(100, 200, 80)], 0.0)
    assert ids(tracker, [(500, 200, 80)], 0.04) == [2]


def test_one_odd_frame_does_not_change_a_track():
    """And a lasting change wins after ln 2 = 0.69 time constants, however many frames a second there are."""
    happy, sad = np.eye(7)[3], np.eye(7)[4]
    for fps in (5, 25, 100):
        track = utils.Track(1, utils.Face(50, 50, 40, 1.0), 0.0)
        assert track.blend(sad, 0.0, 0.5) == pytest.approx(sad)
        for i in range(1, 4 * fps):
            blended = track.blend(sad if i == fps // 2 else happy, i / fps, 0.5)
            assert blended.sum() == pytest.approx(1)
            assert i < 3 or blended.argmax() == 3
        steps = [i for i in range(fps) if track.blend(sad, 4 + i / fps, 0.5).argmax() == 4]
        assert steps[0] / fps == pytest.approx(0.5 * np.log(2), abs=1.5 / fps)
    assert track.blend(happy, 9.0, 0) == pytest.approx(happy)
