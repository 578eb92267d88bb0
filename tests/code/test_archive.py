"""A recording that is read from a time on, or in segments, has the frames and the rows that it has at one go."""

import cv2
import numpy as np
import pytest

import archive
import utils
from tests.conftest import needs_yunet

CONTAINERS = {  # suffix: codec
    "mp4": "mp4v", "mkv": "mp4v", "avi": "MJPG", "webm": "VP80",
    "mov": "mp4v", "ts": "mpg2", "mpg": "mpg1", "wmv": "WMV2",
}  # fmt: skip


def write_frames(path, frames, fps=25, codec="mp4v"):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def vary_frame_rate(source, target, shown=3):
    """Copy an MP4 file to an MKV file whose second half shows each frame `shown` times as long."""
    reader = cv2.VideoCapture(str(source), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])  # the packets as they are
    size = [int(reader.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
    fourcc, half = int(reader.get(cv2.CAP_PROP_FOURCC)), int(reader.get(cv2.CAP_PROP_FRAME_COUNT)) // 2
    options = [cv2.VIDEOWRITER_PROP_RAW_VIDEO, 1, cv2.VIDEOWRITER_PROP_KEY_INTERVAL, 12]
    writer = cv2.VideoWriter(str(target), cv2.CAP_FFMPEG, fourcc, 25, size, options)
    i, (ok, packet) = 0, reader.read()
    while ok:
        writer.set(cv2.VIDEOWRITER_PROP_PTS, i if i < half else half + shown * (i - half))
        writer.write(packet)
        i, (ok, packet) = i + 1, reader.read()
    writer.release()
    return target


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(0)
    return [cv2.resize(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), (64, 48)) for _ in range(400)]


@pytest.mark.parametrize("suffix", [*CONTAINERS, "variable"])
def test_a_start_gives_the_frames_that_follow_it(suffix, noise, tmp_path):
    path = write_frames(
        tmp_path / f"video.{suffix.replace('variable', 'mp4')}", noise, 25, CONTAINERS.get(suffix, "mp4v")
    )
    if suffix == "variable":
        path = vary_frame_rate(path, tmp_path / "video.mkv")
    whole = list(utils.Video(path))
    assert len(whole) == 400
    for start in (0.5, 11.3, 15.0, whole[-2][0], 99.0):
        expected = [(seconds, frame) for seconds, frame in whole if seconds > start - 1e-6]
        found = list(utils.Video(path, start=start, threads=1))
        assert [seconds for seconds, _ in found] == [seconds for seconds, _ in expected]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def half_clip(tmp_path_factory):
    """The bundled clip at half its size: two people, and for two seconds nobody."""
    frames = [cv2.resize(frame, (320, 240)) for _, frame in utils.Video(utils.CLIP)]
    return write_frames(tmp_path_factory.mktemp("half") / "clip.mp4", frames)


def annotate_whole(path, folder, segment):
    """Return the rows of a video as a table, read in segments of that many minutes, without any cluster."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not there: `make archive` installs it")
    options = {"every": 1.0, "rate": 10.0, "smoothing": 0.5, "segment": segment, "models": []}
    child = {"model": str(utils.MODEL.with_suffix(".tflite")), "memory": 4.0}
    data_set, segments = archive.DataSet(folder, [path], options, child), 0
    while data_set.requests:
        request = data_set.requests.popleft()
        segments += data_set.take(request, archive.annotate(request)) > 0
    return pq.read_table(archive.part_path(folder, path)).to_pandas(), segments


@needs_yunet
@pytest.mark.parametrize("variable", [False, True], ids=["steady", "variable"])
def test_segments_have_the_rows_and_the_tracks_of_the_whole(variable, half_clip, tmp_path):
    path = vary_frame_rate(half_clip, tmp_path / "clip.mkv", shown=2) if variable else half_clip
    whole, _ = annotate_whole(path, tmp_path / "whole", 0.0)
    cut, count = annotate_whole(path, tmp_path / "cut", 0.12)
    assert count == (4 if variable else 3)
    assert whole["track"].nunique() >= 2
    assert len(whole) > 15
    same = ["video", "seconds", "track", *archive.SIDES]
    assert whole[same].equals(cut[same])
    np.testing.assert_allclose(whole[list(utils.EMOTIONS)], cut[list(utils.EMOTIONS)], atol=1e-4)
    assert not list((tmp_path / "cut" / "segments").iterdir())
