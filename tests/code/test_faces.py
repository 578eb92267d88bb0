"""Faces are found, framed as FER2013's, and followed; strange frames do no harm."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

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
    assert len(detector.detect(astronaut, [512])) == len(real) == 1


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
    assert np.ptp(crop) <= 1


@pytest.mark.parametrize("x, y", [(0, 0), (99, 0), (0, 79), (99, 79), (50, 40)])
def test_a_face_cut_by_the_edge_is_continued_from_the_edge(x, y):
    frame = np.full((80, 100, 3), 77, np.uint8)
    crop = utils.crop_face(frame, utils.Face(x, y, 60))
    assert crop.shape == (48, 48) and np.ptp(crop) == 0


@pytest.mark.parametrize("gain, offset", [(0.25, 0), (0.1, 0), (0.5, 120)])
def test_the_light_of_a_frame_hardly_changes_a_crop(astronaut, gain, offset):
    face = utils.Face(223, 115, 120)
    crop, changed = (
        utils.crop_face(frame, face) for frame in (astronaut, (astronaut * gain + offset).astype(np.uint8))
    )
    assert (changed.mean(), changed.std()) == pytest.approx((129, 54), abs=5)
    assert np.abs(crop.astype(int) - changed).mean() < 4


def test_a_wall_stays_a_wall():
    wall = np.random.default_rng(0).normal(90, 1, (200, 200)).astype(np.uint8)
    assert utils.crop_face(wall, utils.Face(100, 100, 48)).std() < 30


@needs_yunet
@pytest.mark.parametrize("turns", [1, 3])
def test_a_face_that_lies_on_its_side_is_none(hopper, turns):
    detector = utils.FaceDetector()
    assert detector.detect(hopper)
    assert detector.detect(np.rot90(hopper, turns).copy()) == []


def far_away(portrait, height, width, side):
    """Hopper's portrait in a (height, width, 3) picture of a wall, her face `side` pixels high; and its place."""
    rng = np.random.default_rng(0)
    wall = cv2.GaussianBlur(rng.integers(60, 160, (height, width, 3)).astype(np.uint8), (0, 0), 25)
    face = utils.FaceDetector().detect(portrait)[0]
    scale = side / face.side
    small = cv2.resize(portrait, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    left, top = width // 3, height // 2
    wall[top : top + small.shape[0], left : left + small.shape[1]] = small
    return wall, (left + face.x * scale, top + face.y * scale, side)


FAR_AWAY = [(1080, 1920, 64), (720, 1280, 48), (480, 640, 40)]


@needs_yunet
@pytest.mark.parametrize("height, width, side", FAR_AWAY)
def test_faces_far_away_are_found(hopper, astronaut, height, width, side):
    for portrait in (hopper, astronaut):
        picture, place = far_away(portrait, height, width, side)
        faces = utils.FaceDetector().detect(picture)
        assert len(faces) == 1
        assert (faces[0].x, faces[0].y, faces[0].side) == pytest.approx(place, abs=0.12 * side)


@needs_yunet
@pytest.mark.parametrize("height, width, side", FAR_AWAY)
def test_faces_far_away_are_followed_within_half_a_second(hopper, height, width, side):
    picture, _ = far_away(hopper, height, width, side)
    follower = utils.FaceFollower(utils.FaceDetector())
    nobody = np.full_like(picture, 90)
    for i in range(3):
        assert follower.update(nobody, i / 10) == []
    seen = [[track.id for track in follower.update(np.roll(picture, 4 * i, axis=1), i / 10)] for i in range(3, 30)]
    assert seen[5:] == [[1]] * 22


@needs_yunet
def test_a_newcomer_near_the_camera_is_seen_at_once(astronaut):
    """And one who leaves is searched for once in the fine picture, not in every frame."""
    detector, searched = utils.FaceDetector(), []
    follower = utils.FaceFollower(detector)
    fine = detector.detect
    detector.detect = lambda frame, sizes=None: searched.append(sizes) or fine(frame, sizes)
    nobody = np.full_like(astronaut, 90)
    counts = [len(follower.update(frame, i / 100)) for i, frame in enumerate([nobody] * 3 + [astronaut] * 3)]
    assert counts == [0, 0, 0, 1, 1, 1]
    searched.clear()
    assert [len(follower.update(nobody, 0.1 + i / 100)) for i in range(5)] == [0] * 5
    assert sum(sizes[-1] == detector.fine for sizes in searched) == 1


@needs_yunet
@pytest.mark.parametrize("name", ["brick", "grass", "gravel", "coins", "page", "text", "moon", "coffee", "rocket"])
def test_pictures_of_nobody_have_no_face(name):
    folder = Path(skimage.data.__file__).parent
    path = next(folder / f"{name}{suffix}" for suffix in (".png", ".jpg") if (folder / f"{name}{suffix}").is_file())
    picture = cv2.imread(str(path))
    for size in (512, 1280):
        scale = size / max(picture.shape[:2])
        assert utils.FaceDetector().detect(cv2.resize(picture, None, fx=scale, fy=scale)) == []


def test_squares_overlap_by_what_they_share():
    face = utils.Face(50, 50, 20)
    assert face.overlap(face) == pytest.approx(1)
    assert face.overlap(utils.Face(60, 50, 20)) == pytest.approx(1 / 3)
    assert face.overlap(utils.Face(50, 50, 10)) == pytest.approx(1 / 4)
    assert face.overlap(utils.Face(70, 50, 20)) == face.overlap(utils.Face(90, 90, 20)) == 0


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
