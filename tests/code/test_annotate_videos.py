"""`python scripts/annotate_videos.py`, as a user runs it, on real workers of Dask."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pandas as pd
import pytest

import archive
import utils
from tests.code.test_archive import vary_frame_rate, write_frames
from tests.conftest import assert_one_clear_line, load_script, read_json

distributed = pytest.importorskip("distributed", reason="Dask is not there: `make archive` installs it")
psutil = pytest.importorskip("psutil", reason="psutil comes with Dask: `make archive` installs it")
pytest.importorskip("pyarrow", reason="pyarrow is not there: `make archive` installs it")

SCRIPT = utils.ROOT / "scripts" / "annotate_videos.py"
FACE = ["track", *archive.SIDES]
live_stream = load_script("predict_live_stream")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="its processes are looked at as Linux shows them"),
    pytest.mark.slow,
]


def start(*arguments, **environment):
    """Start the script in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(*arguments, **environment):
    """Run the script to its end; return the finished process with its text."""
    process = start(*arguments, **environment)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def read_rows(output, video):
    return pd.read_parquet(archive.part_path(output, video))


def read_failures(output):
    with open(output / "failures.csv", newline="") as file:
        return {os.path.basename(row["video"]): row["reason"] for row in csv.DictReader(file)}


def parts(output):
    """Return the time at which each part was written, by its name."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "answers").glob("*.parquet")}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder with three seconds of the clip in many forms; returns it, the good files and the names of the bad."""
    folder = tmp_path_factory.mktemp("recordings")
    frames = [cv2.resize(frame, (320, 240)) for seconds, frame in utils.Video(utils.CLIP) if 7 <= seconds < 10]
    grey = [cv2.merge([cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)] * 3) for frame in frames]
    good = [
        write_frames(folder / "monday" / "camera.mp4", frames),
        write_frames(folder / "tuesday" / "camera.mp4", [cv2.flip(frame, 1) for frame in frames]),
        write_frames(folder / "tuesday" / "UPPER.MP4", frames[:50]),
        write_frames(folder / "cut.mkv", frames[40:]),
        write_frames(folder / "grey.avi", grey, codec="MJPG"),
        write_frames(folder / "transport.ts", frames, codec="mpg2"),
        write_frames(folder / "slow.mov", frames, fps=12.5),
        write_frames(folder / "dark.wmv", [frame // 4 for frame in frames], codec="WMV2"),
        write_frames(folder / "wide, and \N{SNOWMAN}.mp4", [np.hstack([frame, frame]) for frame in frames]),
        write_frames(folder / "nobody.mp4", [np.full_like(frame, 90) for frame in frames]),
        write_frames(folder / "moment.mp4", frames[:1]),
        vary_frame_rate(folder / "monday" / "camera.mp4", folder / "variable.mkv"),
        shutil.copy(folder / "monday" / "camera.mp4", folder / "renamed.m4v"),
    ]
    whole = (folder / "cut.mkv").read_bytes()
    broken = {"empty.mp4": b"", "text.mp4": b"no video\n" * 50, "half.mp4": whole[:200], "crash.mp4": whole}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("monday/camera.mp4\nlist is here, file is not.mp4\n")
    (folder / ".hidden.mp4").write_bytes(b"")
    (folder / "link.mp4").symlink_to(folder / "monday" / "camera.mp4")
    return folder, good, [*broken, "list is here, file is not.mp4"]


@pytest.fixture(scope="module")
def crashing(tmp_path_factory):
    """A PYTHONPATH with which a process that is to read crash.mp4 dies of SIGSEGV; the file counts how often."""
    folder = tmp_path_factory.mktemp("crashing")
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if any('crash.mp4' in word for word in sys.orig_argv):\n"
        f"    open({str(folder / 'crashes')!r}, 'a').write('crash')\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    return folder


@pytest.fixture(scope="module")
def archive_run(recordings, crashing, tmp_path_factory):
    """All recordings once through the script, with two workers: the process and the folder of the data set."""
    folder, output = recordings[0], tmp_path_factory.mktemp("output")
    videos = [folder / "monday" / "*.mp4", folder, folder / "notes.txt"]
    return run("--videos", *videos, "--output", output, "--workers", 2, PYTHONPATH=str(crashing)), output


def test_every_recording_has_the_rows_of_the_live_stream(archive_run, recordings, tmp_path):
    _, output = archive_run
    net, counted = utils.EmotionNet(), 0
    for path in recordings[1]:
        live_stream.run(utils.Video(path, rate=10.0), 1.0, 10.0, 0.5, True, False, "", tmp_path / "log.csv", net)
        expected = pd.read_csv(tmp_path / "log.csv", dtype=float).sort_values(["seconds", "track"], ignore_index=True)
        rows = read_rows(output, path)
        counted += len(rows)
        assert rows[FACE].to_numpy().tolist() == expected[FACE].to_numpy().tolist(), path
        np.testing.assert_allclose(rows["seconds"], expected["seconds"], atol=6e-4)
        np.testing.assert_allclose(rows[list(utils.EMOTIONS)], expected[list(utils.EMOTIONS)], atol=2e-4)
        assert list(rows["emotion"]) == [utils.name_emotion(p)[0] for p in rows[list(utils.EMOTIONS)].to_numpy()]
        assert set(rows["video"]) <= {str(path)} and rows["score"].between(0.5, 1).all()
    table = pd.read_parquet(output / "answers")  # and a folder is a table
    assert len(table) == counted > 30 and table["video"].nunique() == len(recordings[1]) - 1  # nobody is in one


def test_what_fails_is_told_and_the_rest_is_done(archive_run, recordings, crashing):
    process, output = archive_run
    failures = read_failures(output)
    assert failures.keys() == set(recordings[2])
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"error: {len(failures)} of {len(failures) + 13} recordings fail")
    assert "SIGSEGV" in failures["crash.mp4"] and (crashing / "crashes").read_text() == "crash"  # tried once
    assert "not a video that OpenCV can read" in failures["empty.mp4"]
    assert "No such file" in failures["list is here, file is not.mp4"]
    assert len(parts(output)) == len(recordings[1])


def test_a_second_start_does_what_is_new_has_changed_or_failed(archive_run, recordings, tmp_path):
    output, folder = shutil.copytree(archive_run[1], tmp_path / "output"), recordings[0]
    before = parts(output)
    os.utime(folder / "cut.mkv")
    process = run("--videos", folder / "cut.mkv", folder / "crash.mp4", folder / "slow.mov", "--output", output)
    assert process.returncode == 0, process.stderr
    after = parts(output)
    written = {name for name in after if after[name] != before.get(name)}
    assert written == {archive.part_path(output, folder / name).name for name in ("cut.mkv", "crash.mp4")}
    assert "crash.mp4" not in read_failures(output) and "text.mp4" in read_failures(output)
    again = run("--videos", folder / "cut.mkv", "--output", output, "--every", 0.5)  # an option that counts
    assert again.returncode == 0 and len(read_rows(output, folder / "cut.mkv")) > len(
        read_rows(archive_run[1], folder / "cut.mkv")
    )


def children_of(process, name="archive.py"):
    """Return the processes below a process that run a file of that name."""

    def runs_it(child):
        try:
            return name in " ".join(child.cmdline()[:2])
        except psutil.NoSuchProcess:  # it has just ended
            return False

    return [child for child in psutil.Process(process.pid).children(recursive=True) if runs_it(child)]


def wait_for(condition):
    """Return what `condition` returns as soon as that is true; pytest-timeout ends a wait in vain."""
    while not (found := condition()):
        time.sleep(0.02)
    return found


def test_a_killed_worker_costs_no_row_and_ctrl_c_keeps_what_is_done(archive_run, recordings, tmp_path):
    folder, good, _ = recordings
    videos, output = [utils.CLIP, *good[:4]], tmp_path / "output"
    process = start("--videos", *videos, "--output", output, "--workers", 2)
    try:
        child = wait_for(lambda: children_of(process))[0]
        child.parent().kill()
        psutil.wait_procs([child])  # no orphan goes on beside the second try
        wait_for(lambda: len(parts(output)) >= 3 and children_of(process))
        before, processes = parts(output), psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
        psutil.wait_procs(processes)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "what is done is kept; the same command goes on" in errors and "Traceback" not in errors
    assert before.items() <= parts(output).items() and not (output / "failures.csv").exists()
    assert not list(output.glob("*/.*"))
    process = run("--videos", *videos, "--output", output, "--workers", 2)
    assert process.returncode == 0, process.stderr
    assert before.items() <= parts(output).items() and len(parts(output)) == len(videos)
    for path in good[:4]:
        pd.testing.assert_frame_equal(read_rows(output, path), read_rows(archive_run[1], path))


def test_a_cluster_that_is_there_is_used_or_refused_with_a_reason(archive_run, recordings, tmp_path):
    """A scheduler and workers of their own on loopback: none there, another version, and what is expected."""
    output, videos = tmp_path / "output", recordings[1][:2]

    def dask(*words, **environment):
        command = [sys.executable, "-m", "dask", *map(str, words)]
        return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL)

    def start_worker(**environment):
        worker = "worker", address, "--nthreads", 1, "--no-dashboard", "--local-directory", tmp_path
        processes.append(dask(*worker, **environment))
        with distributed.Client(address, timeout=600) as client:
            client.wait_for_workers(1)

    processes = [
        dask("scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", tmp_path / "s")
    ]
    try:
        address = wait_for(lambda: read_json(tmp_path / "s"))["address"]
        arguments = "--videos", *videos, "--output", output, "--scheduler", address
        assert_one_clear_line(run(*arguments), f"{address} has no workers", "dask worker")
        (tmp_path / "other" / "pyarrow-1.0.dist-info").mkdir(parents=True)
        (tmp_path / "other" / "pyarrow-1.0.dist-info" / "METADATA").write_text("Name: pyarrow\nVersion: 1.0\n")
        start_worker(PYTHONPATH=str(tmp_path / "other"))
        assert_one_clear_line(run(*arguments), "worker tcp://127.0.0.1:", "has pyarrow 1.0; expected")
        processes[-1].terminate()
        processes[-1].wait()
        start_worker()
        process = run(*arguments)
        assert process.returncode == 0, process.stderr
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    for path in videos:
        pd.testing.assert_frame_equal(read_rows(output, path), read_rows(archive_run[1], path))
    assert_one_clear_line(run(*arguments, "--every", 2), f"no Dask scheduler at {address} (waited 10 s)")


def test_a_recording_that_takes_too_much_memory_fails_alone(recordings, tmp_path):
    huge = write_frames(tmp_path / "huge.avi", [np.full((9000, 12000, 3), 90, np.uint8)] * 3, codec="MJPG")
    output = tmp_path / "output"
    process = run("--videos", huge, recordings[1][0], "--output", output, "--memory", 1.2, "--workers", 1)
    assert process.returncode == 1 and read_failures(output).keys() == {"huge.avi"}
    assert len(parts(output)) == 1


def test_a_full_disk_is_one_clear_line(recordings, tmp_path):
    """A part of the data set has more bytes than a file may have here."""
    import resource

    process = subprocess.run(
        [sys.executable, SCRIPT, "--videos", recordings[1][0], "--output", tmp_path / "output", "--workers", "1"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "File too large" in process.stderr.splitlines()[-1] and "what is done is kept" in process.stderr
    assert parts(tmp_path / "output") == {}


def test_what_cannot_be_used_is_told_in_one_line_and_left_alone(recordings, tmp_path):
    output = tmp_path / "output"
    (output / "answers").mkdir(parents=True)
    videos = "--videos", recordings[1][0], "--output", output
    assert_one_clear_line(run("--videos", tmp_path / "nowhere", "--output", output), "no video at", "nowhere")
    assert_one_clear_line(run("--videos", "", "--output", output), "no video at")
    assert_one_clear_line(run(*videos, "--every", 0), "--every is 0.0; expected 0.001 or more")
    assert_one_clear_line(run(*videos[:2], "--output", recordings[1][0]), "a file; expected a folder")
    with utils.locked(output):
        assert_one_clear_line(run(*videos), "is in use by another process")
    pd.DataFrame({"mine": [1]}).to_parquet(output / "answers" / "mine.parquet")
    assert_one_clear_line(run(*videos), "mine.parquet is no part of such a data set", "give another --output")
    assert pd.read_parquet(output / "answers" / "mine.parquet")["mine"].tolist() == [1]


def test_without_dask_the_script_says_what_installs_it(tmp_path):
    code = (
        "import importlib.util as u, runpy, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'distributed' else find(name, *rest)\n"
        f"sys.argv = ['x', '--output', {str(tmp_path / 'output')!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert_one_clear_line(process, "distributed missing", "make archive")
    assert not (tmp_path / "output").exists()
