"""What people keep is never lost, files from strangers do nothing, and the machine's settings do not matter."""

import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

import utils
from tests.code.test_archive import annotate_whole
from tests.code.test_data import GOOD, as_arrays, read_rows, write_layout
from tests.code.test_video import numbered_frames, write_container
from tests.conftest import assert_one_clear_line, load_script, needs_yunet

LIVE = "predict_live_stream.py"
SHIPPED = utils.MODEL.with_suffix(".tflite")


def python(code, *arguments, **options):
    """Start a Python that has utils.py on its path."""
    code = f"import sys; sys.path.insert(0, {str(utils.ROOT)!r}); import utils\n{code}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes, **options)


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a small disk in memory, with options, and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
            pytest.skip("only root can mount a small disk, on Linux")
        return folder

    if not shutil.which("mount"):
        pytest.skip("there is no mount here")
    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


# ------------------------------------------------------------------------------------------- what is kept


def test_a_replaced_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path):
    file, link, dangling = tmp_path / "private" / "file.txt", tmp_path / "link.txt", tmp_path / "dangling.txt"
    file.parent.mkdir()
    file.write_text("old")
    file.chmod(0o600)
    link.symlink_to(file)
    dangling.symlink_to("new/target.txt")
    for path in (link, dangling):
        with utils.replacing(path) as temporary:
            temporary.write_text("new")
    assert link.is_symlink() and file.read_text() == "new" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert dangling.is_symlink() and (tmp_path / "new" / "target.txt").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"private", "link.txt", "dangling.txt", "new"}
    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_what_is_no_file_is_never_replaced(tmp_path, run_script, write_video):
    pipe, link = tmp_path / "pipe.mp4", tmp_path / "link.png"
    os.mkfifo(pipe)
    link.symlink_to(os.devnull)
    for path in (pipe, link):
        with pytest.raises(utils.InputError, match=f"cannot write .*{path.name}"), utils.replacing(path) as temporary:
            temporary.write_text("new")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_ISCHR(os.stat(os.devnull).st_mode)
    os.mkfifo(tmp_path / "pipe.csv")  # which would wait for a reader for ever
    video = write_video(numbered_frames(5))
    for flag, name in (("--record", "pipe.mp4"), ("--log", "pipe.csv")):
        process = run_script("predict_live_stream.py", "--source", video, flag, name)
        assert_one_clear_line(process, f"cannot write {name}")


def leftovers(folder):
    return [path.name for path in folder.rglob(".*") if not path.parent.name.startswith(".")]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = (
        "with utils.replacing(sys.argv[1]) as path:\n"
        "    path.write_text('a face'); print('written', flush=True); sys.stdin.read()"
    )
    process = python(code, tmp_path / "out.png", stdin=subprocess.PIPE)
    assert process.stdout.readline() == "written\n"
    (part,) = tmp_path.glob(".part-*")
    os.utime(part, (0, 0))  # for a second after its birth it is let alone
    try:
        utils.remove_leftovers(tmp_path)
        assert len(leftovers(tmp_path)) == 1
    finally:
        process.kill()
        process.communicate()
    assert len(leftovers(tmp_path)) == 1
    (tmp_path / ".part-unlocked").mkdir()  # as of a process that was killed while it removed one
    (tmp_path / ".part-unlocked" / "face.png").write_text("a face")
    os.utime(tmp_path / ".part-unlocked", (0, 0))
    process = python("with utils.replacing(sys.argv[1]) as path: path.write_text('new')", tmp_path / "other.txt")
    assert process.communicate() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forked")
def test_a_training_that_is_killed_at_any_write_goes_on_to_the_same_result(tmp_path):
    """Every row of the log, the best weights, and no leftover; what was measured in between is the time alone."""
    command = [sys.executable, utils.ROOT / "tests" / "killed_runs.py", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr

    import training

    def result(run):
        log = [row | {"seconds": None} for row in training.read_rows(run / "log.csv")]
        with np.load(run / "weights.npz") as arrays:
            return log, [arrays[name] for name in arrays.files], {path.name for path in run.iterdir()}

    log, weights, names = result(tmp_path / "whole")
    assert [row["epoch"] for row in log] == ["1", "2"] and log[1]["val_loss"] < log[0]["val_loss"]
    killed = sorted(tmp_path.glob("*-*"))
    assert len(killed) > 20 and {run.name[0] for run in killed} == {"1", "2"}
    for run in killed:
        resumed = result(run)
        assert resumed[0] == log and resumed[2] == names, run.name
        for one, other in zip(resumed[1], weights, strict=True):
            assert one == pytest.approx(other, abs=1e-5), run.name


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    (tmp_path / "image0.png").write_bytes(b"old")
    preprocess, get_data = load_script("preprocess"), load_script("get_data")
    with utils.locked(tmp_path):
        with pytest.raises(utils.InputError, match="is in use by another process"):
            preprocess.write_images(np.zeros((2, 48, 48), np.uint8), tmp_path)
        with pytest.raises(utils.InputError, match="is in use by another process"):
            get_data.get_fer2013("", [], tmp_path, 1.0)
        assert (tmp_path / "image0.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["image0.png"]  # a lock that is free leaves nothing
    preprocess.write_images(np.zeros((2, 48, 48), np.uint8), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image0.png", "image1.png"]


@pytest.fixture
def half_video(astronaut, tmp_path):
    """A function that writes an .mkv file of some seconds of a face, of which the second half is missing."""

    def write(seconds):
        path = tmp_path / "half.mkv"
        content = write_container(path, "mp4v", [cv2.resize(astronaut, (320, 320))] * round(10 * seconds))
        path.write_bytes(content[: len(content) // 2])
        return path

    return write


def test_images_of_a_video_that_breaks_off_are_kept_if_there_are_enough(run_script, half_video, tmp_path):
    process = run_script("preprocess.py", "--source", half_video(10), "--output", "faces")
    assert_one_clear_line(process, "half.mkv breaks off at")
    assert not (tmp_path / "faces").exists()
    process = run_script("preprocess.py", "--source", half_video(42), "--output", "faces")
    assert_one_clear_line(process, "half.mkv breaks off at 2", "s of 4")
    assert len(list((tmp_path / "faces").glob("image*.png"))) >= 20 and "pixels are in faces" in process.stdout


def test_answers_log_and_recording_of_a_video_that_breaks_off_are_kept(run_script, half_video, tmp_path):
    process = run_script(LIVE, "--source", half_video(10), "--log", "out.csv", "--record", "out.mp4")
    assert_one_clear_line(process, "half.mkv breaks off at")
    assert process.stdout.count("Preprocessing ...") >= 4
    assert len((tmp_path / "out.csv").read_text().splitlines()) > 4
    assert 40 < len(list(utils.Video(tmp_path / "out.mp4"))) < 60
    assert {path.name for path in tmp_path.iterdir()} == {"half.mkv", "out.csv", "out.mp4"}


@pytest.mark.parametrize("segment", [0.0, 0.05])  # in minutes
def test_rows_of_a_recording_that_breaks_off_are_kept_and_it_is_listed(segment, half_video, tmp_path):
    """A second start reads it no more, and lists it still; a whole file of its name takes its place."""
    path = half_video(10)
    for _ in range(2):
        table, segments = annotate_whole(path, tmp_path / "output", segment)
        assert 4 <= len(table) <= 6
        assert "half.mkv breaks off at" in (tmp_path / "output" / "failures.csv").read_text()
    assert segments == 0
    write_container(path, "mp4v", numbered_frames(20))
    annotate_whole(path, tmp_path / "output", segment)
    assert (tmp_path / "output" / "failures.csv").read_text().splitlines() == ["video,reason"]


def test_two_writers_of_one_file_do_not_mix(run_script, write_video, tmp_path):
    video = write_video(numbered_frames(5))
    for flag, name in (("--log", "out.csv"), ("--record", "out.mp4")):
        (tmp_path / name).write_bytes(b"of the first")
        with utils.locked(tmp_path, name):
            process = run_script(LIVE, "--source", video, flag, name)
            assert_one_clear_line(process, f"{name} is in use by another process")
            assert (tmp_path / name).read_bytes() == b"of the first"
            other = run_script(LIVE, "--source", video, flag, f"other{name}")
            assert other.returncode == 0, other.stderr
    assert not leftovers(tmp_path)


def test_pictures_are_not_drawn_into_a_folder_that_another_process_fills(run_script, astronaut, tmp_path):
    cv2.imwrite(str(tmp_path / "me.png"), astronaut)
    with utils.locked(tmp_path / "out"):
        process = run_script("predict.py", "--image", "me.png", "--output", "out")
        assert_one_clear_line(process, "out is in use by another process")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_file_of_the_name_of_a_lock_is_left_alone(tmp_path):
    """It is somebody's own, if there is something in it."""
    for folder, content in (("empty", ""), ("full", "mine")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".lock").write_text(content)
        with utils.locked(tmp_path / folder), pytest.raises(utils.InputError, match="in use by another process"):
            with utils.locked(tmp_path / folder):
                pass
        left = [path.read_text() for path in (tmp_path / folder).iterdir()]
        assert left == ([content] if content else [])


def test_a_full_disk_leaves_the_old_recording(run_script, write_video, mount):
    folder = mount("size=1m")
    (folder / "out.mp4").write_bytes(b"old")
    process = run_script(
        "predict_live_stream.py", "--source", write_video(numbered_frames(5)), "--record", folder / "out.mp4"
    )
    assert_one_clear_line(process, "no room left on the disk for out.mp4")
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("out.mp4", b"old")]


def test_a_recording_is_read_back_to_its_end_before_it_replaces_another(tmp_path):
    """Its index is whole and its first pictures can be read; the others are not."""
    live, path = load_script("predict_live_stream"), tmp_path / "out.mp4"
    path.write_bytes(b"old")
    rng = np.random.default_rng(0)
    with pytest.raises(utils.InputError, match="out.mp4 cannot be played to its end"), utils.replacing(path) as target:
        with closing(live.Recorder(target, 10)) as recorder:
            for i in range(20):
                recorder.write(rng.integers(0, 256, (96, 96, 3)).astype(np.uint8), i / 10)
            recorder._writer.release()
            content = bytearray(target.read_bytes())
            index = content.rindex(b"moov") - 4
            content[index // 2 : index] = bytes(index - index // 2)
            target.write_bytes(content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.mp4", b"old")]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_picture_that_finds_no_room_is_told_and_leaves_the_old_one(tmp_path):
    """The last byte of the new file is one too many, as on a disk that is full."""
    import resource

    cv2.imwrite(str(tmp_path / "me.png"), np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8))
    command = [sys.executable, utils.ROOT / "scripts" / "predict.py", "--image", "me.png", "--output", "out"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    output = tmp_path / "out" / "me_emotions.png"
    size = output.stat().st_size
    output.write_bytes(b"old")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))  # noqa: E731
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    assert process.returncode == 1 and process.stderr.splitlines()[-1].startswith("error: [Errno 27]"), process.stderr
    assert output.read_bytes() == b"old" and [path.name for path in output.parent.iterdir()] == [output.name]


# ------------------------------------------------------------------------------------ models from strangers


def test_a_model_that_answers_nan_is_neither_saved_nor_loaded_nor_scored(build_small_model, tmp_path):
    import training

    model, path = build_small_model(), tmp_path / "model.pkl"
    path.write_bytes(b"old")
    model.layers[-1].set_weights([np.full_like(weights, np.nan) for weights in model.layers[-1].get_weights()])
    with pytest.raises(utils.InputError, match="model.pkl answers with probabilities that add up to nan"):
        utils.save_model(model, path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pkl", b"old")]
    path.write_bytes(pickle.dumps(model))
    with pytest.raises(utils.InputError, match="model.pkl answers with probabilities that add up to nan"):
        utils.load_model(path)
    with pytest.raises(utils.InputError, match="answers with NaN"):
        training.scores(np.full((3, 7), np.nan), np.zeros(3, int))


def test_a_network_that_answers_nan_is_refused(tmp_path):
    content = bytearray(SHIPPED.read_bytes())
    middle = len(content) // 8 * 4
    content[middle : middle + 4000] = np.full(1000, np.nan, np.float32).tobytes()  # among the weights
    (tmp_path / "nan.tflite").write_bytes(content)
    with pytest.raises(utils.InputError, match="nan.tflite answers with probabilities that add up to nan"):
        utils.EmotionNet(tmp_path / "nan.tflite")


def damage_first_layer(content):
    """Change a .tflite file's bytes: its first layer reads a tensor that is not there. OpenCV crashes on it."""

    def follow(position):
        return position + struct.unpack_from("<I", content, position)[0]

    def field(table, number):
        vtable = table - struct.unpack_from("<i", content, table)[0]
        return follow(table + struct.unpack_from("<H", content, vtable + 4 + 2 * number)[0])

    graph = follow(field(follow(0), 2) + 4)
    inputs = field(follow(field(graph, 3) + 4), 1)
    struct.pack_into("<i", content, inputs + 4, 1 << 20)


def test_damaged_models_are_one_clear_line(run_script, tmp_path, write_video):
    """The first would crash the process, the others make OpenCV raise errors of several kinds, and print its own."""
    whole = bytearray(SHIPPED.read_bytes())
    crashing = bytearray(whole)
    damage_first_layer(crashing)
    video = write_video(numbered_frames(3))
    for name, content in {"crashing": crashing, "cut": whole[:-100_000], "shifted": b"\0" * 4 + whole}.items():
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(content)
        process = run_script("predict_live_stream.py", "--source", video, "--model", path)
        assert_one_clear_line(process, f"{name}.tflite is not a whole .tflite model")


@needs_yunet
def test_a_damaged_face_detector_is_told_before_the_first_frame(tmp_path):
    """A layer's weights have another name, which OpenCV does not miss until it looks for faces."""
    path = tmp_path / "yunet.onnx"
    path.write_bytes(utils.YUNET.read_bytes().replace(b"conv1.weight", b"conv1.wexght", 1))
    with pytest.raises(utils.InputError, match="yunet.onnx is not YuNet's ONNX file"):
        utils.FaceDetector(path)


def test_the_models_that_ship_are_known_and_opened_at_once(tmp_path):
    """After a change of them: `cd results/model && sha256sum *.tflite > SHA256SUMS`, as `save_model` does."""
    for shipped in (SHIPPED, utils.PRE_TRAINED_MODEL.with_suffix(".tflite")):
        digest = hashlib.sha256(shipped.read_bytes()).hexdigest()
        assert digest in utils.known_hashes(), shipped.name
        for _ in range(2):
            utils._record_hash(Path(shutil.copy(shipped, tmp_path)))
        assert f"{digest}  {shipped.name}\n" in (tmp_path / "SHA256SUMS").read_text()
    assert (tmp_path / "SHA256SUMS").read_text().count("\n") == 2


def test_pickles_that_hang_or_fill_the_memory_are_refused_before_they_run(tmp_path):
    """None of them starts TensorFlow either, which takes seconds."""
    crafted = {
        "nested": b"\x80\x04" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
        "lists": b"\x80\x04]" + b"\x94]h\x00a" * 200 + b".",
        "tuples": b"\x80\x04)" + b"\x85" * 1_000_000 + b".",
        "bomb": b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b".",
        "persistent": b"\x80\x04\x8c\x01xQ.",
    }
    for name, content in crafted.items():
        (tmp_path / f"{name}.pkl").write_bytes(content)
    code = (
        "import glob\n"
        "for path in sorted(glob.glob('*.pkl')):\n"
        "    try: utils.load_model(path)\n"
        "    except utils.InputError as error: print(error)\n"
        "print('tensorflow' in sys.modules)"
    )
    process = python(code, cwd=tmp_path)
    try:
        *lines, started = process.communicate()[0].splitlines()
    finally:
        process.kill()
    assert started == "False" and len(lines) == len(crafted)
    for line, name in zip(lines, sorted(crafted), strict=True):
        assert line.startswith(f"{name}.pkl is not a whole pickled Keras model: ") and len(line) < 300


def test_a_pickled_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "MAX_BYTES", 1_000_000)
    with zipfile.ZipFile(archive := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", " " * 2_000_000)

    class Model:
        def __reduce__(self):
            import keras

            return keras.Model._unpickle_model, (archive,)

    path = tmp_path / "bomb.pkl"
    path.write_bytes(pickle.dumps(Model()))
    with pytest.raises(utils.InputError, match="bomb.pkl .* unpacks to 2,000,000 bytes; expected less than 1,000,000"):
        utils.load_model(path)


# ------------------------------------------------------------------------------ data and pictures from strangers


def write_tar(path, *members):
    """Write a .tar.gz of (name, content, type of member)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "nowhere"
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_tar_whose_csv_is_no_file_is_named(kind, tmp_path):
    write_tar(tmp_path / "fer2013.tar.gz", ("fer2013.csv", b"", kind))
    with pytest.raises(utils.InputError, match="fer2013.tar.gz: 0 CSV files inside; expected one"):
        utils.load_fer2013("train", tmp_path)


def test_archives_and_csv_files_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "MAX_BYTES", 50_000)
    write_tar(tmp_path / "fer2013.tar.gz", ("notes.txt", bytes(100_000), tarfile.REGTYPE))
    with pytest.raises(utils.InputError, match="fer2013.tar.gz unpacks to more than 50,000 bytes"):
        utils.load_fer2013("test", tmp_path)
    (tmp_path / "train.csv").write_text("emotion,pixels\n" + 12 * f"0,{GOOD}\n")
    with pytest.raises(utils.InputError, match="train.csv has more than 50,000 bytes"):
        utils.load_fer2013("train", tmp_path)
    np.savez_compressed(tmp_path / "train.npz", differences=np.zeros((100, 48, 48), np.uint8))
    (tmp_path / "train.csv").unlink()
    (tmp_path / "fer2013.tar.gz").unlink()
    with pytest.raises(utils.InputError, match="train.npz is broken"):
        utils.load_fer2013("train", tmp_path)


@pytest.mark.parametrize("row", [f"0,{'7' * 100_000}", f"{'x' * 100_000},{GOOD}", f"0,{GOOD[:-1]}{'z' * 100_000}"])
def test_a_long_cell_makes_no_long_error(row, tmp_path):
    (tmp_path / "train.csv").write_text(f"emotion,pixels\n{row}\n")
    with pytest.raises(utils.InputError, match="train.csv, line 2: ") as error:
        utils.load_fer2013("train", tmp_path)
    assert len(str(error.value).replace(str(tmp_path), "")) < 200


def test_blank_lines_are_skipped_and_lines_are_still_counted(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(f"\nemotion,pixels\n\n3,{GOOD}\n   \n\n4,{GOOD}\n\n")
    assert utils.load_fer2013("train", tmp_path)[1].tolist() == [3, 4]
    path.write_text(f"emotion,pixels\n\n\n3,{GOOD}\n9,{GOOD}\n")
    with pytest.raises(utils.InputError, match="line 5: the emotion is '9'"):
        utils.load_fer2013("train", tmp_path)


def test_a_small_picture_file_that_unpacks_to_too_many_pixels_is_told(run_script, tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    process = run_script("predict.py", "--image", "bomb.png")
    process.stderr = "".join(line for line in process.stderr.splitlines(True) if "Haar" not in line)
    assert_one_clear_line(process, "no picture at bomb.png", "900000000 pixels")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows allows fewer names")
@pytest.mark.parametrize("name", ["a:b.mp4", "end.mp4 ", "-v.mp4", "50%s {} %d.mp4", ".hidden.mp4", "https:.mp4"])
def test_a_video_may_have_any_name(name, write_video, tmp_path, monkeypatch):
    write_video(numbered_frames(5), name="plain.mp4").rename(tmp_path / name)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link.mp4").symlink_to(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name, "links/link.mp4"):
        assert len(list(utils.Video(path))) == 5


def test_an_error_is_one_short_line_that_no_name_can_colour_or_break(run_script):
    process = run_script(LIVE, "--source", "\x1b[31m\r\nred.mp4")
    assert_one_clear_line(process, "no video at \\x1b[31m\\r\\nred.mp4: expected a camera number")
    process = run_script(LIVE, "--source", "/".join(["long" * 50] * 9))
    assert_one_clear_line(process, "error: no video at longlong", " ... ", "or an rtsp or http URL")
    assert len(process.stderr) <= 300


@pytest.mark.parametrize("name", ["file.txt", "file.txt/below", "link", "pipe"])
def test_results_need_a_folder_which_is_told_at_once(name, run_script, tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "link").symlink_to("file.txt")
    os.mkfifo(tmp_path / "pipe")
    process = run_script("preprocess.py", "--output", name)
    assert_one_clear_line(process, f"{name.split('/')[0]} is a file; expected a folder")
    assert process.stdout == "" and (tmp_path / "file.txt").read_text() == "mine"


def test_a_list_of_videos_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(utils.InputError, match="no list at .*list.txt: expected a text file"):
        load_script("annotate_videos").find_videos([str(tmp_path / "list.txt")])


@needs_yunet
def test_a_detector_that_works_outlives_a_download_that_fails(tmp_path, capsys):
    """It is another file than the one that is asked for: another version of YuNet, say."""
    path = tmp_path / "yunet.onnx"
    path.write_bytes(utils.YUNET.read_bytes() + b"\x98\x06\x01")  # a field that ONNX does not know
    before = path.read_bytes()
    load_script("get_data").get_detector("http://127.0.0.1:1/yunet.onnx", path, 1.0)
    assert path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [path.name]
    assert "faces will be found with the model that is there" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- the machine's settings


@pytest.mark.parametrize("kind", ["folder", "csv", "other csv", "zip"])
def test_fer2013_csv_is_taken(kind, small_fer2013, tmp_path, monkeypatch):
    monkeypatch.setattr(
        utils, "FER2013_CLASS_COUNTS", {"Training": (30,) * 7, "PublicTest": (5,) * 7, "PrivateTest": (5,) * 7}
    )
    rows = read_rows(small_fer2013 / "icml_face_data.csv")
    write_layout(rows, tmp_path / "tar", "original")
    with tarfile.open(tmp_path / "tar" / "fer2013.tar.gz") as archive:
        content = archive.extractfile("fer2013/fer2013.csv").read()
    folder, archive = tmp_path / "data", tmp_path / ("mine.csv" if kind == "other csv" else f"fer2013.{kind}")
    folder.mkdir()
    if kind == "folder":
        (folder / "fer2013.csv").write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            file.writestr("train.csv/", "")  # a folder
            file.writestr("archive/fer2013.csv", content)
    else:
        archive.write_bytes(content)
    if kind != "folder":
        load_script("get_data").add_archive(archive, archive.name, folder)
    assert [path.name for path in folder.glob("*.csv")] == ["fer2013.csv"]
    for split, is_train in (("train", True), ("test", False)):
        images, labels = as_arrays([row for row in rows if (row[1] == "Training") == is_train])
        loaded = utils.load_fer2013(split, folder)
        np.testing.assert_array_equal(loaded[0], images)
        np.testing.assert_array_equal(loaded[1], labels)


def test_a_data_folder_that_cannot_be_written_to_has_no_cache_and_no_error(mount):
    folder = mount("size=1m")
    (folder / "train.csv").write_text(f"emotion,pixels\n3,{GOOD}\n")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for _ in range(2):
        assert utils.load_fer2013("train", folder)[1].tolist() == [3]
    assert [path.name for path in folder.iterdir()] == ["train.csv"]


def test_a_backend_that_is_not_there_is_one_clear_line(run_script, tmp_path):
    process = run_script("train.py", "--epochs", 1, KERAS_BACKEND="nothing")
    assert_one_clear_line(process, "KERAS_BACKEND", "nothing", "tensorflow")
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "none_here"}))
    process = run_script("get_data.py", "--data", "new", "--sources", "x", KERAS_HOME=str(tmp_path), KERAS_BACKEND="")
    assert_one_clear_line(process, "keras.json", "tensorflow")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tensorflow'] = None\n")
    process = run_script("train.py", "--epochs", 1, PYTHONPATH=str(tmp_path), KERAS_BACKEND="")
    assert_one_clear_line(process, "KERAS_BACKEND", "of Keras and its backends there are keras")
    assert "tensorflow" not in process.stderr.split("there are")[1]


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="JAX is not installed")
def test_the_hack_says_which_backend_it_needs(run_script, tmp_path):
    process = run_script("hack_the_cnn.py", "--output", tmp_path, KERAS_BACKEND="jax")
    assert_one_clear_line(process, "jax", "KERAS_BACKEND=tensorflow")


def test_channels_first_makes_no_difference(tmp_path):
    (tmp_path / "keras.json").write_text(json.dumps({"image_data_format": "channels_first"}))
    code = (
        "keras = utils.import_keras()\nprint(keras.layers.GlobalAveragePooling2D()(keras.ops.ones((1, 2, 3, 5))).shape)"
    )
    out, errors = python(code, env=os.environ | {"KERAS_HOME": str(tmp_path)}).communicate()
    assert out == "(1, 5)\n", errors


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["cv2", "numpy"])
def test_ctrl_c_during_the_imports_is_one_line(module, tmp_path):
    """A module in the way sends what Ctrl-C sends."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    process = subprocess.run(
        [sys.executable, utils.ROOT / "scripts" / "preprocess.py"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )
    assert process.stderr == "interrupted\n" and process.returncode in (130, -signal.SIGINT)


def test_ctrl_c_that_a_library_turns_into_another_error_is_still_told_as_ctrl_c(tmp_path):
    """As pybind11 does in what Keras imports."""
    (tmp_path / "keras.py").write_text(
        "try:\n    raise KeyboardInterrupt\nexcept BaseException as error:\n    raise ImportError from error\n"
    )
    process = subprocess.run(
        [sys.executable, utils.ROOT / "scripts" / "train.py"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.stderr == "interrupted\n" and process.returncode in (130, -signal.SIGINT)
