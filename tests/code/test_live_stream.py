"""`python scripts/predict_live_stream.py`, as a user runs it."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import cv2
import numpy as np
import pytest

import utils
from tests.code.test_video import numbered_frames, serve_mjpeg
from tests.conftest import assert_one_clear_line, load_script, needs_yunet

SCRIPT = "predict_live_stream.py"
ANSWER = re.compile(rf"\d\d:\d\d:\d\ds : (no face|(unsure|{'|'.join(utils.EMOTIONS)}) , \d{{1,3}}%)")
live_stream = load_script("predict_live_stream")


@pytest.fixture(scope="module")
def has_webcam():
    return cv2.VideoCapture(0).isOpened()


@pytest.fixture(scope="module")
def clip_run(has_webcam, tmp_path_factory):
    """The bundled clip once through the script, with a log and a recording: the process, the rows and the video."""
    folder = tmp_path_factory.mktemp("clip")
    source = ["--source", utils.CLIP] if has_webcam else []  # without one, the clip is played
    command = [sys.executable, utils.ROOT / "scripts" / SCRIPT, *source, "--log", "log.csv", "--record", "out.mp4"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return process, rows, folder / "out.mp4"


def test_prints_an_answer_for_every_second_in_the_promised_form(clip_run):
    process, _, _ = clip_run
    assert process.returncode == 0, process.stderr
    head, *blocks = process.stdout.removesuffix("\n\n").split("\n\n")
    assert head == "Reading video stream ..."
    for second, block in enumerate(blocks):
        first, answer = block.split("\n")
        assert first == "Preprocessing ..."
        assert ANSWER.fullmatch(answer), answer
        assert answer.startswith(f"00:00:{second:02}s : ")
    assert len(blocks) == 20
    assert sum("%" in block for block in blocks) >= 18


def test_the_log_has_the_box_and_the_probabilities_of_every_face(clip_run):
    _, rows, _ = clip_run
    assert len({row["seconds"] for row in rows}) >= 18
    assert len({row["track"] for row in rows}) >= 2  # two people are in the clip
    for row in rows:
        assert sum(float(row[emotion]) for emotion in utils.EMOTIONS) == pytest.approx(1, abs=0.002)
        assert 60 < int(row["right"]) - int(row["left"]) == int(row["bottom"]) - int(row["top"]) < 400


def test_the_log_and_the_lines_say_the_same(clip_run):
    process, rows, _ = clip_run
    first = {}
    for row in rows:
        first.setdefault(int(float(row["seconds"]) + 0.01), row)
    for second, row in first.items():
        best = max(utils.EMOTIONS, key=lambda emotion: float(row[emotion]))
        said = best if float(row[best]) >= utils.UNSURE else "unsure"
        assert f"00:00:{second:02}s : {said} , " in process.stdout


def test_the_recording_is_as_long_as_the_stream(clip_run):
    _, _, path = clip_run
    video = utils.Video(path)
    frames = [frame for _, frame in video]
    assert len(frames) / video.fps == pytest.approx(20, abs=0.1)
    assert frames[0].shape == (480, 640 + 230, 3)


def test_without_a_webcam_the_clip_is_played_and_a_message_says_so(clip_run, has_webcam):
    if has_webcam:
        pytest.skip("there is a webcam")
    process, _, _ = clip_run
    assert process.returncode == 0
    assert "No webcam" in process.stderr and "bundled clip" in process.stderr
    assert process.stdout.count("Preprocessing ...") == 20


def test_every_and_all_faces(run_script, write_video, astronaut, hopper):
    frame = np.hstack([astronaut, cv2.resize(hopper[:512], (512, 512))])
    process = run_script(SCRIPT, "--source", write_video([frame] * 20, fps=10), "--every", 0.5, "--all-faces")
    blocks = process.stdout.strip().split("\n\n")[1:]
    assert [block.split("\n")[1].split("s : ")[0] for block in blocks] == [
        "00:00:00.00", "00:00:00.50", "00:00:01.00", "00:00:01.50",
    ]  # fmt: skip
    for block in blocks:
        assert "face 1 : " in block and "face 2 : " in block


def test_no_face_is_said(run_script, write_video):
    process = run_script(SCRIPT, "--source", write_video(numbered_frames(20), fps=10))
    assert process.stdout.count("s : no face\n") == 2


def test_starts_no_tensorflow_and_no_plotting(write_video):
    """Starting TensorFlow takes four seconds, which the first answer does not have."""
    path = write_video(numbered_frames(5))
    code = (
        f"import sys, runpy; sys.argv = ['x', '--source', {str(path)!r}]\n"
        f"try: runpy.run_path({str(utils.ROOT / 'scripts' / SCRIPT)!r}, run_name='__main__')\n"
        "finally: print(sorted({'tensorflow', 'keras', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.endswith("[]\n"), process.stdout + process.stderr


def test_a_camera_is_told_by_the_clock_and_its_loss_is_reported():
    with serve_mjpeg(numbered_frames(25), seconds_per_frame=0.04) as (url, server):
        command, before = [sys.executable, utils.ROOT / "scripts" / SCRIPT, "--source", url], time.strftime("%H:%M")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            lines = (line for line in process.stdout if "no face" in line)
            answers = [next(lines) for _ in range(3)]  # the stream has a second of frames: it was opened again
            server.shutdown()
            _, errors = process.communicate()
        finally:
            process.kill()
    assert answers[0][:5] in (before, time.strftime("%H:%M"))
    assert process.returncode == 1
    assert re.match("error: the stream stopped, and http://127.0.0.1", errors.splitlines()[-1])


def test_bad_input_is_one_clear_line(run_script, tmp_path, write_video, build_small_model):
    video = write_video(numbered_frames(5))
    truncated = tmp_path / "truncated.tflite"
    truncated.write_bytes(utils.MODEL.with_suffix(".tflite").read_bytes()[:5000])
    build_small_model(side=32).export(tmp_path / "side32.tflite", format="litert", verbose=False)
    build_small_model(emotions=5).export(tmp_path / "five.tflite", format="litert", verbose=False)
    for arguments, words in [
        (["--source", "nowhere.mp4"], ["nowhere.mp4", "expected a camera number"]),
        (["--source", truncated], ["truncated.tflite", "not a video"]),
        (["--source", 97], ["camera 97"]),
        (["--source", video, "--model", "none.tflite"], ["none.tflite", "train.py"]),
        (["--source", video, "--model", truncated], ["truncated.tflite", "not a whole"]),
        (["--source", video, "--model", tmp_path / "side32.tflite"], ["side32.tflite takes 32x32x1", "48x48x1"]),
        (["--source", video, "--model", tmp_path / "five.tflite"], ["five.tflite", "5 values", "expected 7"]),
        (["--source", 99999999999], ["99999999999", "expected a camera number"]),
        (["--source", video, "--every", 0], ["--every", "more than 0"]),
        (["--source", video, "--every", "nan"], ["--every", "more than 0"]),
        (["--source", video, "--rate", -1], ["--rate", "0 or more"]),
        (["--source", video, "--record", tmp_path], [tmp_path, ".mp4"]),
        (["--source", video, "--log", tmp_path / "out.mp4"], ["out.mp4", ".csv"]),
        (["--source", video, "--record", tmp_path / "out.nothing"], ["out.nothing", ".mp4"]),
    ]:
        assert_one_clear_line(run_script(SCRIPT, *arguments), *words)
    assert not list(tmp_path.glob(".*")), "half-written files are left"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the screens of other systems are always there")
@pytest.mark.parametrize("display", ["", ":987"], ids=["none", "unreachable"])
def test_show_without_a_screen_says_what_to_do(run_script, write_video, display):
    video = write_video(numbered_frames(5))
    process = run_script(SCRIPT, "--source", video, "--show", DISPLAY=display, WAYLAND_DISPLAY="")
    assert_one_clear_line(process, "--show needs a screen", "--record")


def test_a_reader_who_has_had_enough_is_no_error():
    command = f"{sys.executable} {utils.ROOT / 'scripts' / SCRIPT} --source {utils.CLIP} | head -n 1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert process.stdout == "Reading video stream ...\n" and "rror" not in process.stderr


def test_the_clip_without_yunet_gives_eighteen_answers(tmp_path):
    """Nothing needs a download: the Haar cascade finds the faces too."""
    code = tmp_path / "without_yunet.py"
    code.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(utils.ROOT)!r})\n"
        "import utils\n"
        "utils.YUNET = utils.ROOT / 'missing.onnx'\n"
        f"runpy.run_path({str(utils.ROOT / 'scripts' / SCRIPT)!r}, run_name='__main__')\n"
    )
    process = subprocess.run([sys.executable, code, "--source", utils.CLIP], capture_output=True, text=True)
    assert process.stdout.count("%") >= 18
    assert "Haar" in process.stderr.splitlines()[0]


@pytest.fixture
def virtual_screen():
    """The display of an Xvfb, a screen that nobody sees."""
    if not shutil.which("Xvfb"):
        pytest.skip("Xvfb is not there: `apt install xvfb`")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x800x24"], pass_fds=[write], stderr=subprocess.DEVNULL
    )
    os.close(write)
    display = ":" + os.read(read, 10).decode().strip()
    assert display != ":", "Xvfb did not start"
    yield display
    server.terminate()
    server.wait()


def test_the_window_shows_a_file_in_its_own_time(run_script, write_video, astronaut, virtual_screen):
    video = write_video([astronaut] * 30, fps=10)
    began = time.monotonic()
    process = run_script(SCRIPT, "--source", video, "--show", DISPLAY=virtual_screen)
    assert process.returncode == 0, process.stderr
    assert time.monotonic() - began > 2.9
    assert process.stdout.count("Preprocessing ...") == 3


@pytest.mark.parametrize("link", [None, os.link, os.symlink], ids=["same", "hard link", "link"])
@pytest.mark.parametrize("flag", ["--record", "--log"])
def test_what_is_read_is_never_overwritten(run_script, write_video, tmp_path, flag, link):
    suffix = {"--record": ".mp4", "--log": ".csv"}[flag]
    video = write_video(numbered_frames(5)).rename(tmp_path / f"mine{suffix}")
    before = video.read_bytes()
    output = tmp_path / f"other{suffix}" if link else video
    if link:
        link(video, output)
    assert_one_clear_line(run_script(SCRIPT, "--source", video, flag, output), output.name, "another name")
    assert video.read_bytes() == output.read_bytes() == before


@pytest.mark.parametrize("form", ["file://{}", "FILE://{}", " {} "])
def test_what_is_read_is_known_in_every_form_that_is_read(write_video, form):
    video = write_video(numbered_frames(5))
    assert len(list(utils.Video(form.format(video)))) == 5
    with pytest.raises(utils.InputError, match="video.mp4 would be overwritten"):
        utils.check_output(video, ".mp4", [form.format(video)])
    with pytest.raises(utils.InputError, match="no video at tmp"):
        utils.Video(f"file://{str(video).lstrip('/')}")  # which FFmpeg takes for an absolute path
    moved = video.rename(video.with_name("my clip 100%.mp4"))
    assert len(list(utils.Video(moved.as_uri()))) == 5


def test_the_home_folder_may_be_written_as_a_tilde(run_script, write_video, tmp_path):
    write_video(numbered_frames(15), fps=10)
    process = run_script(SCRIPT, "--source", "~/video.mp4", "--log", "~/out.csv", HOME=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out.csv").read_text().startswith("seconds,")


def heed_signals():
    """Let this process end by the signals that a job in the background, or one under nohup, ignores."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def recording(tmp_path):
    """Start the script on an endless stream, recording to out.mp4, and wait for its third answer: it runs a second."""
    with serve_mjpeg(numbered_frames(25) * 100, seconds_per_frame=0.04) as (url, _):
        command = [sys.executable, utils.ROOT / "scripts" / SCRIPT, "--source", url, "--record", tmp_path / "out.mp4"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals if hasattr(signal, "SIGHUP") else None,
        )
        try:
            for _ in range(12):
                process.stdout.readline()
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_and_other_signals_end_a_stream_with_a_summary_and_keep_the_recording(tmp_path, name):
    with recording(tmp_path) as process:
        for _ in range(1 if name == "SIGINT" else 2):  # a shell and the system may both send one
            process.send_signal(getattr(signal, name))
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = [line for line in errors.splitlines() if "Haar" not in line]
    assert len(lines) == 1 and re.fullmatch(r"\d+ s of video in \d+ frames, an answer every 1 s", lines[0]), errors
    assert sum(1 for _ in utils.Video(tmp_path / "out.mp4")) > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4"]


def test_a_reader_who_goes_away_leaves_the_recording(tmp_path):
    with recording(tmp_path) as process:
        process.stdout.close()
        process.wait()
        process.stdout = None
    assert process.returncode == 0
    assert sum(1 for _ in utils.Video(tmp_path / "out.mp4")) > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no disk that is always full")
def test_a_log_whose_disk_is_full_leaves_the_recording(run_script, write_video, astronaut, tmp_path):
    os.symlink("/dev/full", tmp_path / "out.csv")
    video = write_video([cv2.resize(astronaut, (320, 320))] * 15, fps=10)
    process = run_script(SCRIPT, "--source", video, "--log", "out.csv", "--record", "out.mp4")
    assert_one_clear_line(process, "No space left")
    assert sum(1 for _ in utils.Video(tmp_path / "out.mp4")) >= 1


def test_a_recording_that_finds_no_room_leaves_the_older_one(tmp_path, monkeypatch):
    """A disk with less than two megabytes; then one that is full in spite of what it says."""
    path = tmp_path / "out.mp4"
    path.write_bytes(b"older")
    picture, usage = np.zeros((480, 870, 3), np.uint8), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(utils.InputError, match="no room left"), utils.replacing(path) as target:
        with closing(live_stream.Recorder(target, 10)) as recorder:
            recorder.write(picture, 0.0)
    monkeypatch.undo()
    with pytest.raises(utils.InputError, match="cannot be played"), utils.replacing(path) as target:
        with closing(live_stream.Recorder(target, 10)) as recorder:
            recorder.write(picture, 0.0)
            target.write_bytes(b"")
            recorder._writer.release()
            target.write_bytes(b"half")
    assert path.read_bytes() == b"older"


def write_recording(path, pictures):
    with closing(live_stream.Recorder(path, 10)) as recorder:
        for seconds, picture in pictures:
            recorder.write(picture, seconds)
    return [frame for _, frame in utils.Video(path)]


def test_times_that_jump_by_an_hour_do_not_make_an_hour_of_recording(tmp_path):
    picture = np.zeros((48, 96, 3), np.uint8)
    frames = write_recording(tmp_path / "out.mp4", [(s, picture) for s in (0.0, 0.1, 3600.0, 3600.1, 3600.2)])
    assert len(frames) == 1 + 1 + 10 * live_stream.LONGEST + 2


def test_pictures_of_another_shape_are_in_the_recording(tmp_path):
    wide, tall = np.full((48, 96, 3), 60, np.uint8), np.full((96, 48, 3), 200, np.uint8)
    frames = write_recording(tmp_path / "out.mp4", [(i / 10, wide if i < 5 else tall) for i in range(10)])
    assert len(frames) == 10 and {frame.shape for frame in frames} == {(48, 96, 3)}
    assert frames[4].mean() == pytest.approx(60, abs=5)
    assert frames[9][:, :20].mean() == pytest.approx(200, abs=10)  # a quarter as wide, at the left


def test_a_camera_is_answered_for_once_in_every_second_of_the_clock(astronaut, capsys):
    """It is opened in the middle of a second, and gives ten frames a second for six seconds."""

    class Camera:
        is_live, fps, opened = True, 10.0, 1_000_000_000.55

        def __iter__(self):
            return ((i / 10, astronaut) for i in range(60))

    live_stream.run(Camera(), 1.0, 10.0, 0.5, False, False, "", "", utils.EmotionNet())
    answers = [line for line in capsys.readouterr().out.splitlines() if " : " in line]
    seconds = [int(line[6:8]) for line in answers]
    assert len(answers) >= 6
    assert {(later - sooner) % 60 for sooner, later in zip(seconds, seconds[1:], strict=False)} == {1}


def test_a_clock_that_is_set_while_a_camera_runs_is_followed(astronaut, capsys):
    """The clock goes forward by an hour after two seconds, and back by three after four."""

    class Camera:
        is_live, fps, opened = True, 10.0, 1_000_000_000.0

        def __iter__(self):
            for i in range(60):
                self.opened = 1_000_000_000.0 + 3600 * (0 if i < 20 else 1 if i < 40 else -2)
                yield i / 10, astronaut

    live_stream.run(Camera(), 1.0, 10.0, 0.5, False, False, "", "", utils.EmotionNet())
    hours = [int(line[:2]) for line in capsys.readouterr().out.splitlines() if " : " in line]
    assert [(hour - hours[0]) % 24 for hour in hours] == [0, 0, 1, 1, 22, 22]


def test_ctrl_c_between_the_writing_of_a_picture_and_its_counting_keeps_the_recording(tmp_path):
    recorder, picture = live_stream.Recorder(tmp_path / "out.mp4", 10), np.zeros((48, 96, 3), np.uint8)
    recorder.write(picture, 0.0)
    write = recorder._writer.write

    class Interrupted:
        release = recorder._writer.release

        def write(self, picture):
            write(picture)
            raise KeyboardInterrupt

    recorder._writer = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        recorder.write(picture, 0.1)
    recorder.close()
    assert len(list(utils.Video(tmp_path / "out.mp4"))) == 2


@pytest.mark.parametrize("fps", [24000 / 1001, 60000 / 1001, 119.8765])
def test_a_recording_has_the_rate_of_the_file(fps, run_script, tmp_path):
    video, frames = tmp_path / "fast.avi", numbered_frames(20)
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), fps, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    process = run_script(SCRIPT, "--source", video, "--record", tmp_path / "out.mp4")
    assert process.returncode == 0, process.stderr
    assert utils.Video(tmp_path / "out.mp4").fps == pytest.approx(fps, abs=0.001 if fps < 65 else 0.01)


@needs_yunet
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_checkout_whose_folder_is_not_utf_8_reads_videos_and_says_what_it_cannot_read(write_video, tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    for name in ("utils.py", f"scripts/{SCRIPT}", "results/model/my_own_model.tflite"):
        target = os.path.join(folder, os.fsencode(name))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(utils.ROOT / name, target)
    script = os.path.join(folder, b"scripts", SCRIPT.encode())
    shutil.copy(write_video(numbered_frames(15)), os.path.join(folder, b"video.mp4"))

    def run(*arguments):
        command = [sys.executable, script, *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8")

    assert run("--source", tmp_path / "video.mp4").stdout.count("no face") == 2
    assert_one_clear_line(run("--source", os.path.join(folder, b"video.mp4")), "is not UTF-8", "rename")
    process = run("--source", tmp_path / "video.mp4", "--record", os.path.join(folder, b"out.mp4"))
    assert process.returncode == 1 and "is not UTF-8" in process.stderr


def test_show_runs_no_module_of_the_current_folder(run_script, write_video, tmp_path):
    (tmp_path / "cv2.py").write_text("open('ran', 'w')")
    run_script(SCRIPT, "--source", write_video(numbered_frames(5)), "--show", DISPLAY="", WAYLAND_DISPLAY="")
    assert not (tmp_path / "ran").exists()
