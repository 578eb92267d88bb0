"""A recording that is read from a time on, or in segments, has the frames and the rows that it has at one go."""

import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

import archive
import utils
from tests.conftest import load_script, needs_yunet

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


def annotate_all(paths, folder, segment=0.0):
    """Do what is to be done of some videos, in segments of that many minutes; return the DataSet and their number."""
    pytest.importorskip("pyarrow", reason="pyarrow is not there: `make archive` installs it")
    options = {"every": 1.0, "rate": 10.0, "smoothing": 0.5, "segment": segment, "models": []}
    child = {"model": str(utils.MODEL.with_suffix(".tflite")), "memory": 4.0}
    data_set, segments = archive.DataSet(folder, paths, options, child), 0
    while data_set.requests:
        request = data_set.requests.popleft()
        segments += data_set.take(request, archive.annotate(request)) > 0
    return data_set, segments


def annotate_whole(path, folder, segment):
    """Return the rows of a video as a table, read in segments of that many minutes, and their number."""
    _, segments = annotate_all([path], folder, segment)
    return pd.read_parquet(archive.part_path(folder, path)), segments


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


def read_failures(folder):
    table = folder / "failures.csv"
    return pd.read_csv(table).set_index("video")["reason"].to_dict() if table.is_file() else {}


def test_a_recording_that_is_back_unchanged_is_no_failure_any_more(noise, tmp_path):
    video, away = write_frames(tmp_path / "video.mp4", noise[:30]), tmp_path / "away.mp4"
    annotate_all([video], tmp_path / "out")
    video.rename(away)
    annotate_all([video], tmp_path / "out")
    assert "no video" in read_failures(tmp_path / "out")[str(video)]
    away.rename(video)
    data_set, segments = annotate_all([video], tmp_path / "out")
    assert segments == 0 and not data_set.failures and not read_failures(tmp_path / "out")


def test_that_a_recording_breaks_off_is_known_from_its_part_alone(noise, tmp_path):
    video = write_frames(tmp_path / "video.mkv", noise)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    annotate_all([video], tmp_path / "out")
    told = read_failures(tmp_path / "out")
    assert "breaks off" in told[str(video)]
    (tmp_path / "out" / "failures.csv").unlink()
    (tmp_path / "out" / "answers" / "other-0.parquet").write_bytes(b"")  # of a recording that is not asked for
    _, segments = annotate_all([video], tmp_path / "out")
    assert segments == 0 and read_failures(tmp_path / "out") == told
    assert len(pd.read_parquet(tmp_path / "out" / "answers")) == 0  # noise shows no face, and every part can be read


def test_a_recording_has_one_part_however_its_path_is_spelled(noise, tmp_path):
    write_frames(tmp_path / "here" / "video.mp4", noise[:30])
    (tmp_path / "link").symlink_to(tmp_path / "here")
    for place in ("here", "link"):
        annotate_all([tmp_path / place / "video.mp4"], tmp_path / "out")
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 1
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    _, segments = annotate_all([tmp_path / "link" / "video.mp4"], tmp_path / "out")
    assert segments == 0 and len(list((tmp_path / "out" / "answers").iterdir())) == 1


def test_an_empty_part_as_a_power_cut_leaves_it_is_made_anew(noise, tmp_path):
    video = write_frames(tmp_path / "video.mp4", noise[:30])
    annotate_all([video], tmp_path / "out")
    part = archive.part_path(tmp_path / "out", video)
    part.write_bytes(b"")
    _, segments = annotate_all([video], tmp_path / "out")
    assert segments == 1 and part.stat().st_size


def test_a_folder_stands_for_the_recordings_that_a_person_sees_in_it(tmp_path):
    folder = tmp_path / "all"
    seen = ["a.mp4", "film.mkv/film.mkv", "disk/b.mp4"]
    deleted = ["$RECYCLE.BIN/S-1/c.mp4", "#recycle/d.mp4", "@eaDir/a.mp4/e.mp4", ".Trash-1000/f.mp4", ".g.mp4"]
    for name in [*seen, *deleted]:
        path = tmp_path / name if name.startswith("disk") else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "disk").symlink_to(tmp_path / "disk")
    (folder / "a link").symlink_to(folder / "film.mkv")
    (folder / "back").symlink_to(folder)
    (tmp_path / "outside.mp4").touch()
    (folder / "up").symlink_to(tmp_path)
    found = load_script("annotate_videos").find_videos([str(folder)])
    assert sorted(str(path.relative_to(folder)) for path in found) == sorted(seen)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_may_be_saved_as_windows_does(encoding, tmp_path):
    (tmp_path / "caf\xe9.mp4").touch()
    (tmp_path / "list.txt").write_text("caf\xe9.mp4\r\n", encoding=encoding)
    found = load_script("annotate_videos").find_videos([str(tmp_path / "list.txt")])
    assert found == [tmp_path / "caf\xe9.mp4"]
