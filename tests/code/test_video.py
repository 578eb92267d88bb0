"""Frames come with their times, from files and from streams, and what is no video says so."""

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
    with serve_mjpeg(numbered_frames(25) * 2, seconds_per_frame=0.04) as (url, _):
        video = utils.Video(url)
        assert video.is_live
        stream = iter(video)
        next(stream)
        time.sleep(0.6)  # as if the answer to a frame took that long
        before, _ = next(stream)
        after, _ = next(stream)
        stream.close()
    assert before > 0.3  # about fifteen frames were passed over
    assert 0 < after - before < 1


def test_a_stream_that_stops_is_opened_again():
    with serve_mjpeg(numbered_frames(12), seconds_per_frame=0.02) as (url, _):
        seen = []
        for seconds, frame in utils.Video(url):
            seen.append(number_of(frame))
            if seconds > 2.5:
                break
    assert sum(b < a for a, b in zip(seen, seen[1:], strict=False)) >= 1  # it began anew at least once


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
    assert time.monotonic() - began < 10


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
