"""The live stream goes on without taking more: a short `make soak`."""

import os

import pytest

import utils
from tests import soak


@pytest.fixture(scope="module")
def detector():
    return utils.FaceDetector()


@pytest.fixture(scope="module")
def net():
    return utils.EmotionNet()


@pytest.fixture
def clip(write_video, astronaut):
    """A second of a face, 25 frames."""
    return write_video([astronaut[:320, 60:380]] * 25, fps=25)


def over(figures):
    """Return what is over its limit, but for the time: another program may slow the end of a short run."""
    return [name for name in soak.tell(figures) if "time" not in name]


def test_a_file_that_is_read_again_and_again_takes_no_more(clip, detector, net):
    figures = soak.soak_file(clip, detector, net, 300, settled=50)
    assert figures["frames"] == 300 and not over(figures)


def test_a_camera_that_comes_and_goes_takes_no_more(astronaut, detector, net):
    figures = soak.soak_camera([astronaut[:320, 60:380]] * 15, detector, net, 8, settled=3)
    assert figures["camera: frames"] >= 8 and not over(figures)


def test_a_descriptor_that_is_left_open_is_seen(clip, detector, net, monkeypatch):
    opened = []
    monkeypatch.setattr(utils, "draw_faces", lambda *_: opened.append(os.open(os.devnull, os.O_RDONLY)))
    figures = soak.soak_file(clip, detector, net, 75, settled=25)
    for descriptor in opened:
        os.close(descriptor)
    assert over(figures) == ["descriptors more"] and figures["descriptors more"] == 50
