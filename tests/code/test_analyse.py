"""What `analyse` says of a stream: the same as a full search of every frame, in any light, and steadily."""

import cv2
import numpy as np
import pytest

import utils
from tests.benchmark import analyse_every_frame
from tests.conftest import load_script, needs_yunet

ACTED = utils.DATA / "videos" / "woman_shows_emotions.mp4"
live_stream = load_script("predict_live_stream")


def answers(stream):
    """Return what is answered, at every second of a stream: a list of the faces as `analyse` yields them."""
    due = utils.Schedule(1)
    return [faces for seconds, _, faces in stream if due.is_due(seconds)]


def agree(some, others, near=0.0):
    """Count the answers where both see nobody, or what `others` name is to `some` the most probable, or near it."""
    return sum(
        a[0][2][b[0][2].argmax()] >= a[0][2].max() - near if a and b else a == b
        for a, b in zip(some, others, strict=True)
    )


@pytest.fixture(scope="module")
def net():
    return utils.EmotionNet()


@pytest.fixture(scope="module")
def clip_answers(net):
    return answers(utils.analyse(utils.Video(utils.CLIP, rate=10.0), utils.FaceDetector(), net))


@needs_yunet
@pytest.mark.parametrize("path", [utils.CLIP, ACTED], ids=["clip", "actress"])
def test_ten_frames_a_second_coarse_to_fine_say_what_every_frame_at_full_size_says(path, net):
    if not path.is_file():
        pytest.skip(f"{path} is not there: see data/README.md")
    detector = utils.FaceDetector()
    simple = answers(analyse_every_frame(utils.Video(path), detector, net))
    ours = answers(utils.analyse(utils.Video(path, rate=10.0), detector, net))
    assert agree(simple, ours, near=0.1) >= 19  # a face between two emotions tips at a hair
    off, apart, same_ids = [], [], 0
    for reference, faces in zip(simple, ours, strict=True):
        reference, faces = ({number: (face, p) for number, face, p in some} for some in (reference, faces))
        same_ids += reference.keys() == faces.keys()
        for number in reference.keys() & faces.keys():
            (a, p), (b, q) = reference[number], faces[number]
            off.append(max(abs(a.x - b.x), abs(a.y - b.y)) / a.side)
            apart.append(np.abs(p - q).max())
    assert same_ids >= 19
    assert np.quantile(off, 0.95) < 0.05  # the rest are faces that are cut by the edge while they come in or leave
    assert np.median(apart) < 0.05 and max(apart) < 0.2  # of the seven probabilities of a face


@needs_yunet
@pytest.mark.parametrize("gain, offset", [(0.25, 0), (0.1, 0), (1.25, 20)], ids=["quarter", "tenth", "bright"])
def test_the_clip_in_other_light_gives_its_answers(gain, offset, net, clip_answers):
    lit = (
        (seconds, np.clip(frame * gain + offset, 0, 255).astype(np.uint8))
        for seconds, frame in utils.Video(utils.CLIP, rate=10.0)
    )
    assert agree(clip_answers, answers(utils.analyse(lit, utils.FaceDetector(), net))) >= 18


@needs_yunet
def test_frames_between_carry_the_last_faces(net, astronaut):
    stream = [(i / 30, astronaut) for i in range(10)]
    faces = [faces for _, _, faces in utils.analyse(stream, utils.FaceDetector(), net)]
    assert [faces[i] is faces[i - 1] for i in range(1, 10)] == [i % 3 > 0 for i in range(1, 10)]
    every = [faces for _, _, faces in utils.analyse(stream, utils.FaceDetector(), net, rate=0)]
    assert len({id(faces) for faces in every}) == 10


@needs_yunet
def test_the_answer_stays_with_one_of_two_people_of_like_size(net, astronaut, hopper):
    """They lean forward and back; only who is clearly larger takes the answer over."""
    detector = utils.FaceDetector()

    def portrait(picture, side):
        left, top, right, bottom = detector.detect(picture)[0].box
        margin = (right - left) // 3
        return cv2.resize(picture[max(0, top - margin) : bottom + margin, left - margin : right + margin], (side, side))

    def frame(first, second):
        wall = np.full((360, 640, 3), 90, np.uint8)
        for picture, left, side in ((astronaut, 40, first), (hopper, 360, second)):
            wall[60 : 60 + side, left : left + side] = portrait(picture, side)
        return wall

    leaning = [(200 + round(10 * np.sin(i / 3)), 200 - round(10 * np.sin(i / 3))) for i in range(40)]
    ends = set()
    for sides in ((150, 240), (240, 150)):
        stream = [(i / 10, frame(*sides)) for i, sides in enumerate(leaning + [sides] * 5 + leaning[:10])]
        first = [faces[0][0] for _, _, faces in utils.analyse(stream, detector, net)]
        assert set(first[:40]) == {1} and len(set(first[45:])) == 1
        ends.add(first[-1])
    assert ends == {1, 2}


def test_an_answer_that_is_not_sure_says_so():
    unsure, sure = np.full(7, 1 / 7), np.eye(7)[3] * 0.5 + 0.5 / 7
    face = utils.Face(50, 50, 40)
    assert live_stream.format_answer("00:00:01", [(1, face, unsure)], False) == "00:00:01s : unsure , 14%"
    assert live_stream.format_answer("00:00:01", [(1, face, sure)], False) == "00:00:01s : Happy , 57%"
