"""Frames come with their times, from files and from streams, and what is no video says so."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

import utils


def numbered_frames(count):
    """Frames whose grey value is ten times their number."""
    return [np.full((64, 96, 3), 10 * i, np.uint8) for i in range(count)]


def number_of(frame):
    return round(float(frame.mean()) / 10)


@contextmanager
def serve_mjpeg(frames, seconds_per_frame):
    """Serve frames as an endless-looking MJPEG stream, as network cameras do; it breaks off after the last one."""

    class Camera(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for frame in frames:
                picture = cv2.imencode(".jpg", frame)[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                try:
                    self.wfile.write(head.encode() + picture + b"\r\n")
                except OSError:  # the viewer is gone
                    return
                time.sleep(seconds_per_frame)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/stream.mjpg", server
    finally:
        server.shutdown()
        server.server_close()


def test_a_file_gives_every_frame_with_its_time(write_video):
    video = utils.Video(write_video(numbered_frames(20), fps=10))
    times, numbers = zip(*[(seconds, number_of(frame)) for seconds, frame in video], strict=True)
    assert not video.is_live
    assert times == pytest.approx(np.arange(20) / 10)
    assert numbers == pytest.approx(range(20), abs=1)


def test_a_stream_gives_the_newest_frame_and_not_the_next():
    frames = [np.full((64, 96, 3), 4 * i, np.uint8) for i in range(60)]
    with serve_mjpeg(frames, seconds_per_frame=0.04) as (url, _):
        video = utils.Video(url)
        assert video.is_live
        stream = iter(video)
        first = next(stream)[1].mean() / 4
        time.sleep(0.6)  # as if the answer to a frame took that long
        before, frame = next(stream)
        after, _ = next(stream)
        stream.close()
    assert before > 0.3
    assert frame.mean() / 4 - first > 5  # about fifteen frames were passed over
    assert after > before


def test_a_stream_that_stops_is_opened_again():
    with serve_mjpeg(numbered_frames(12), seconds_per_frame=0.02) as (url, _):
        seen = []
        for _, frame in utils.Video(url):
            seen.append(number_of(frame))
            if seen[-1] < max(seen):
                break
    assert seen[-1] < max(seen)  # it began anew


def test_the_time_of_opening_follows_a_clock_that_is_set(monkeypatch):
    with serve_mjpeg(numbered_frames(12), seconds_per_frame=0.02) as (url, _):
        video = utils.Video(url)
        stream, clock, before = iter(video), time.time, video.opened
        next(stream)
        assert video.opened == before
        monkeypatch.setattr(time, "time", lambda: clock() + 3600)
        next(stream)
        stream.close()
    assert video.opened - before == pytest.approx(3600, abs=1)


def test_a_stream_that_stays_away_is_reported():
    with serve_mjpeg(numbered_frames(12), seconds_per_frame=0.05) as (url, server):
        stream = iter(utils.Video(url, patience=1.0))
        next(stream)
        server.shutdown()
        server.server_close()
        began = time.monotonic()
        with pytest.raises(utils.InputError, match="stopped.*127.0.0.1"):
            for _ in stream:
                pass
    assert time.monotonic() - began > 1


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere.mp4", "no video at nowhere.mp4: expected a camera number, a file, or an rtsp or http URL"),
        ("97", "camera 97 gives no picture"),
        ("http://127.0.0.1:9/x.mjpg", "http://127.0.0.1:9/x.mjpg gives no picture"),
    ],
)
def test_what_cannot_be_opened_is_named(source, message):
    with pytest.raises(utils.InputError, match=message):
        utils.Video(source, patience=1.0)


@pytest.mark.parametrize("content", [b"", b"this is no video\n" * 50, "half"], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_video_is_named(content, write_video, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(write_video(numbered_frames(20)).read_bytes()[:800] if content == "half" else content)
    with pytest.raises(utils.InputError, match="broken.mp4 is not a video that OpenCV can read"):
        utils.Video(path)


def test_a_video_is_read_once(write_video):
    video = utils.Video(write_video(numbered_frames(5)))
    assert len(list(video)) == 5
    with pytest.raises(RuntimeError, match="read before"):
        list(video)


def test_passwords_in_addresses_are_not_shown():
    with pytest.raises(utils.InputError) as error:
        utils.Video("http://user:secret@127.0.0.1:9/x.mjpg", patience=1.0)
    assert "http://127.0.0.1:9/x.mjpg" in str(error.value) and "secret" not in str(error.value)
    for address in ("rtsp://me:secret@10.0.0.2/x", "rtsp://me:s/t@10.0.0.2/x?key=secret", "rtsp://10.0.0.2/x#secret"):
        assert utils.show_path(address) == "rtsp://10.0.0.2/x"
    for password in ("se#cret", "se?cret", "s?ec/ret", "s/ec#ret", "sec\nret?"):
        assert utils.show_path(f"rtsp://me:{password}@10.0.0.2/x") == "rtsp://..."
    assert utils.show_path("http://10.0.0.2/x?password=sec@ret") == "http://..."
    assert utils.show_path("rtsp://10.0.0.2:554/user=me&password=secret&channel=1") == "rtsp://10.0.0.2:554/..."


@pytest.mark.parametrize(
    "source", ["concat://{}", "cache:{}", "subfile,,start,0,end,0,,://{}", "file://{}/image%d.png"]
)
def test_addresses_that_ffmpeg_takes_for_files_are_refused(write_video, source):
    """Or what is read could be written over: `check_output` knows files by their paths."""
    with pytest.raises(utils.InputError):
        utils.Video(source.format(write_video(numbered_frames(5))))


def test_a_rate_gives_the_first_frame_of_each_interval(write_video):
    path = write_video(numbered_frames(25) * 4, fps=25)
    times, numbers = zip(*[(seconds, number_of(frame)) for seconds, frame in utils.Video(path, rate=10.0)], strict=True)
    assert times[:6] == pytest.approx([0, 0.12, 0.2, 0.32, 0.4, 0.52])
    assert len(times) == 40
    assert numbers == pytest.approx(np.array(times) * 25 % 25, abs=1)  # each is the frame of its time


def test_a_rate_spares_a_camera_its_frames_too():
    with serve_mjpeg(numbered_frames(25) * 4, seconds_per_frame=0.02) as (url, _):
        times = []
        for seconds, _ in utils.Video(url, rate=5.0):
            times.append(seconds)
            if seconds > 1.5:
                break
    assert len(times) <= 9 and np.all(np.diff(np.floor(np.array(times) * 5 + 1e-6)) >= 1)


def damage(path, first, last):
    """Overwrite a part of a file's bytes, given as shares of its length."""
    data = bytearray(path.read_bytes())
    place = slice(int(first * len(data)), int(last * len(data)))
    data[place] = np.random.default_rng(0).bytes(place.stop - place.start)
    path.write_bytes(data)


def noise(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (64, 96, 3)).astype(np.uint8) for _ in range(count)]


def test_what_follows_a_damage_is_read_and_the_gap_is_told(write_video, capsys):
    path = write_video(noise(100), fps=10)
    damage(path, 0.4, 0.5)
    times = [seconds for seconds, _ in utils.Video(path)]
    assert times[-1] == pytest.approx(9.9) and 80 < len(times) < 100
    assert np.all(np.diff(times) > 0)
    assert "video.mp4 is damaged: " in capsys.readouterr().err


def test_a_file_whose_end_is_damaged_says_so(write_video, capsys):
    path = write_video(noise(100), fps=10)
    damage(path, 0.5, 0.98)  # behind it stands the index
    assert len(list(utils.Video(path))) < 60
    assert "s of it cannot be read" in capsys.readouterr().err


CONTAINERS = [("mkv", "mp4v"), ("avi", "MJPG"), ("webm", "VP80"), ("flv", "FLV1")]


def write_container(path, codec, frames, fps=10):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path.read_bytes()


@pytest.mark.parametrize("suffix, codec", CONTAINERS)
def test_a_file_that_breaks_off_gives_what_it_has_and_then_an_error(suffix, codec, tmp_path, capsys):
    path, seen = tmp_path / f"half.{suffix}", []
    content = write_container(path, codec, noise(100))
    assert len(list(utils.Video(path))) == 100
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(utils.InputError, match=rf"half.{suffix} breaks off at [3-6]\.\d s of (9.9|10.0) s") as error:
        for seconds, _ in utils.Video(path):
            seen.append(seconds)
    assert 30 < len(seen) < 70 and f"at {seen[-1]:.1f} s" in str(error.value)
    assert capsys.readouterr().err == ""
    with pytest.raises(utils.InputError, match="breaks off"):  # as a segment of it is read
        list(utils.Video(path, start=8.0))


def move_index_to_the_front(path):
    """Rewrite an .mp4 file of OpenCV so that its boxes are ftyp, moov, and the others, as files for the web are."""
    content, boxes, place = path.read_bytes(), [], 0
    while place < len(content):
        length = int.from_bytes(content[place : place + 4])
        boxes.append(content[place : place + length])
        place += length
    index = bytearray(next(box for box in boxes if box[4:8] == b"moov"))
    table = index.index(b"stco")  # from where each chunk's place in the file is told
    for i in range(int.from_bytes(index[table + 8 : table + 12])):
        entry = slice(table + 12 + 4 * i, table + 16 + 4 * i)
        index[entry] = (int.from_bytes(index[entry]) + len(index)).to_bytes(4)
    path.write_bytes(boxes[0] + index + b"".join(box for box in boxes[1:] if box[4:8] != b"moov"))


def test_an_mp4_file_breaks_off_where_its_boxes_are_not_whole(write_video, capsys):
    path = write_video(noise(100), fps=10)
    move_index_to_the_front(path)
    assert len(list(utils.Video(path))) == 100 and capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(utils.InputError, match="video.mp4 breaks off at"):
        list(utils.Video(path))


def test_an_mp4_file_that_was_cut_without_encoding_is_whole(write_video, capsys):
    """An entry of its list of edits, where there is room for one, says that the first three seconds are not shown."""
    path = write_video(noise(100), fps=10)
    content = bytearray(path.read_bytes())
    edits = content.index(b"elst")
    scale = content.index(b"mdhd") + 16
    start = 3 * int.from_bytes(content[scale : scale + 4])
    content[edits + 16 : edits + 20] = start.to_bytes(4)
    path.write_bytes(content)
    frames = list(utils.Video(path))
    assert 60 < len(frames) < 80
    told = capsys.readouterr().err
    assert "ends 3.0 s before its own length: it is damaged there, or was cut" in told and told.count("\n") == 1


def test_a_whole_file_says_nothing(write_video, capsys):
    list(utils.Video(write_video(noise(30), fps=10)))
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf_8_is_an_error_and_no_crash(write_video, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    os.rename(write_video(numbered_frames(5)), path)
    with pytest.raises(utils.InputError, match=r"caf\\udce9.mp4, whose name is not UTF-8: rename"):
        utils.Video(os.fsdecode(path))


def test_the_home_folder_may_be_written_as_a_tilde(write_video, tmp_path, monkeypatch):
    write_video(numbered_frames(5))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(list(utils.Video("~/video.mp4"))) == 5


def test_the_scheme_of_an_address_may_be_written_large():
    with serve_mjpeg(numbered_frames(25), seconds_per_frame=0.02) as (url, _):
        assert next(iter(utils.Video(url.replace("http", "HTTP"))))[1].shape == (64, 96, 3)


def test_the_query_of_an_address_is_not_shown():
    with pytest.raises(utils.InputError) as error:
        utils.Video("http://127.0.0.1:9/x.mjpg?user=me&pwd=secret", patience=1.0)
    assert "http://127.0.0.1:9/x.mjpg gives no picture" in str(error.value) and "secret" not in str(error.value)


def test_the_time_waited_is_the_time_that_was_waited():
    began = time.monotonic()
    with pytest.raises(utils.InputError) as error:
        utils.Video("http://127.0.0.1:9/x.mjpg", patience=60.0)  # it is refused at once
    told = float(re.search(r"\(waited (\d+\.\d) s\)", str(error.value))[1])
    assert told <= time.monotonic() - began + 0.05


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="permissions of POSIX")
def test_a_file_that_may_not_be_read_says_so(write_video):
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.move(write_video(numbered_frames(5)), folder)
        os.chmod(path, 0)
        os.chmod(folder, 0o755)
        process = read_as_nobody(path)
    assert "video.mp4 cannot be read: Permission denied" in process.stdout, process.stderr


def read_as_nobody(path):
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(utils.ROOT)!r})\n"
        "import utils\n"
        "if os.getuid() == 0: os.seteuid(65534)\n"  # nobody; root reads everything
        f"try: utils.Video({path!r})\n"
        "except utils.InputError as error: print(error)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
