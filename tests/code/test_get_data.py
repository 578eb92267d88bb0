"""scripts/get_data.py against a server on this machine that serves whole, broken and hostile archives."""

import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest

import utils
from tests.code.test_data import as_arrays, read_rows, write_layout
from tests.conftest import load_script

SCRIPT = utils.ROOT / "scripts" / "get_data.py"
YUNET = b"stands for the face detector"
DIGITS = np.arange(20, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)  # a "digit" of each grey value
COUNTS = {"Training": (30,) * 7, "PublicTest": (5,) * 7, "PrivateTest": (5,) * 7}  # of small_fer2013


def as_npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


MNIST = as_npz(x_train=DIGITS[:14], y_train=np.arange(14) % 10, x_test=DIGITS[14:], y_test=np.arange(14, 20) % 10)


class Answer:
    """What the server sends: a body, perhaps with another Content-Length or none, perhaps then silence."""

    def __init__(self, body, length="its own", then_hang=False):
        self.body, self.then_hang = body, then_hang
        self.length = len(body) if length == "its own" else length


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        answer = self.server.answers.get(self.path)
        if answer is None:
            return self.send_error(404)
        self.send_response(200)
        if answer.length is not None:
            self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        self.wfile.write(answer.body)
        if answer.then_hang:
            self.server.closing.wait(60)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server with `answers`, a dict from path to Answer, and `requests`, the paths that were asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.requests, server.closing = [], threading.Event()
    server.answers = {"/yunet.onnx": Answer(YUNET), "/mnist.npz": Answer(MNIST)}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def rows(small_fer2013):
    return read_rows(small_fer2013 / "icml_face_data.csv")


@pytest.fixture
def pack(tmp_path):
    """Return rows of FER2013 as the bytes of a zip in which a layout lies in a sub-folder, beside other files."""

    def pack(rows, layout="challenge", compression=zipfile.ZIP_DEFLATED, **more):
        write_layout(rows, tmp_path / layout, layout)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as file:
            for path in sorted((tmp_path / layout).iterdir()):
                file.write(path, f"emotions-detector/{path.name}")
                file.writestr(f"__MACOSX/emotions-detector/._{path.name}", "an icon")
            file.writestr("emotions-detector/example_submission.csv", "emotion\n0\n")
            for name, content in more.items():
                file.writestr(name, content)
        return buffer.getvalue()

    return pack


@pytest.fixture(scope="module")
def script():
    return load_script("get_data")


@pytest.fixture
def get_data(script, server, tmp_path, monkeypatch):
    """Run the script's main() with the small data set taken for the published one."""
    monkeypatch.setattr(utils, "FER2013_CLASS_COUNTS", COUNTS)
    monkeypatch.setattr(script, "YUNET_SHA256", hashlib.sha256(YUNET).hexdigest())
    monkeypatch.setattr(script, "MNIST_SHA256", hashlib.sha256(MNIST).hexdigest())

    def run(*command_line):
        defaults = {
            "--data": tmp_path / "data",
            "--sources": f"{server.url}/first.zip {server.url}/second.zip",
            "--detector-source": f"{server.url}/yunet.onnx",
            "--digits-source": f"{server.url}/mnist.npz",
        }
        flags = [str(part) for flag in defaults.items() for part in flag]
        script.main(**vars(script.parse_args([*flags, *map(str, command_line)])))

    return run


@pytest.fixture
def files_in(tmp_path):
    """Return every file in the data folder, hidden and half ones too, without the cache and the digits."""

    def files_in(folder=tmp_path / "data"):
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return files - {"cache/train.npz", "cache/test.npz", *(f"digit-recognizer/{name}" for name in DIGIT_FILES)}

    return files_in


DIGIT_FILES = {"train.csv", "test.csv"}
DETECTOR = f"models/{utils.YUNET.name}"


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("challenge", {"train.csv", "test.csv", "icml_face_data.csv"}),
        ("course", {"train.csv", "test.csv", "test_with_emotions.csv"}),
        ("original", {"fer2013.tar.gz"}),
    ],
)
def test_downloads_every_layout_once(layout, files, get_data, server, pack, rows, files_in, tmp_path, capsys):
    server.answers["/first.zip"] = Answer(pack(rows, layout))
    get_data()
    assert files_in() == files | {DETECTOR}
    for split in ("train", "test"):
        images, labels = utils.load_fer2013(split, tmp_path / "data")
        expected = as_arrays([row for row in rows if (row[1] == "Training") == (split == "train")])
        np.testing.assert_array_equal(images, expected[0])
        np.testing.assert_array_equal(labels, expected[1])
    assert server.requests == ["/yunet.onnx", "/first.zip", "/mnist.npz"]

    capsys.readouterr()
    get_data()
    assert len(server.requests) == 3
    output = capsys.readouterr()
    assert "YuNet is already at" in output.out and "FER2013 is already complete" in output.out
    assert not output.err


def cut(body, length):
    """Return the Answer that breaks off in the middle of `body`, after announcing `length` bytes or None."""
    return Answer(body[: len(body) // 2], length and len(body))


def flip(body, start, count=1):
    """Return the Answer that is `body` with `count` bytes changed."""
    return Answer(body[:start] + bytes(byte ^ 1 for byte in body[start : start + count]) + body[start + count :])


def flip_digit(body):
    return flip(body, body.index(b"emotion, Usage, pixels") + 40)


def change(rows, number, emotion="", pixel=""):
    """Return `rows` with another emotion or another first pixel in one of them."""
    changed = emotion or rows[number][0], rows[number][1], f"{pixel} {rows[number][2]}".strip()
    return [*rows[:number], changed, *rows[number + 1 :]]


BROKEN = {  # what the server sends, and what the user has to read
    "cut off": (lambda pack, rows: cut(pack(rows), True), "retrieval incomplete: got only"),
    "cut off unnoticed": (lambda pack, rows: cut(pack(rows), None), "not a whole .zip or .tar.gz"),
    "not found": (lambda pack, rows: None, "404"),
    "web page": (lambda pack, rows: Answer(b"<!DOCTYPE html><title>Sign in"), "it begins with b'<!DOCTYPE html>"),
    "bad CRC": (lambda pack, rows: flip_digit(pack(rows, compression=zipfile.ZIP_STORED)), "Bad CRC-32"),
    "bad stream": (lambda pack, rows: flip(pack(rows), 1000, 100), "first.zip: "),
    "a row less": (
        lambda pack, rows: Answer(pack(rows[1:])),
        "train set has 209 rows; expected 210 (Angry 29 instead of 30)",
    ),
    "a test row less": (
        lambda pack, rows: Answer(pack(rows[:-1])),
        "test set has 69 rows; expected 35 + 35 (Neutral 9 instead of 10)",
    ),
    "another label": (
        lambda pack, rows: Answer(pack(change(rows, 0, emotion="1"))),
        "210 rows; expected 210 (Angry 29 instead of 30, Disgust 31 instead of 30)",
    ),
    "a letter": (
        lambda pack, rows: Answer(pack(change(rows, 5, pixel="x"))),
        "first.zip: train.csv, line 7: pixel 0 is 'x'",
    ),
}


@pytest.mark.parametrize(("answer", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_download_is_told_and_leaves_nothing(answer, words, get_data, server, pack, rows, files_in, capsys):
    server.answers["/first.zip"] = answer(pack, rows)
    with pytest.raises(utils.InputError, match="the train set is missing.*in a browser.*--archive"):
        get_data()
    assert files_in() == {DETECTOR}
    note = capsys.readouterr().err.splitlines()[0]
    assert note.startswith("note: ") and f"{server.url}/first.zip" in note and words in note

    server.answers["/first.zip"] = Answer(pack(rows))  # the next day
    get_data()
    assert "train.csv" in files_in()


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "C:\\evil.txt", "..\\evil.txt"])
def test_a_zip_that_would_write_outside_is_refused(name, get_data, server, pack, rows, files_in, tmp_path, capsys):
    server.answers["/first.zip"] = Answer(pack(rows, **{name: "evil"}))
    with pytest.raises(utils.InputError):
        get_data()
    assert files_in() == {DETECTOR}
    assert not list(tmp_path.rglob("evil*"))
    assert f"{name!r} in it is a link or leads out of the folder" in capsys.readouterr().err


def test_a_zip_with_a_link_is_refused(get_data, pack, rows, files_in, tmp_path):
    link = zipfile.ZipInfo("emotions-detector/train.csv")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(utils.InputError, match="train.csv' in it is a link"):
        get_data("--archive", tmp_path / "link.zip")
    assert files_in() == {DETECTOR}


def test_a_zip_that_would_fill_the_disk_is_refused(get_data, script, pack, rows, files_in, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MAX_BYTES", 1_000_000)
    (tmp_path / "big.zip").write_bytes(pack(rows))
    with pytest.raises(utils.InputError, match="unpacks to .* bytes; expected less than 1,000,000"):
        get_data("--archive", tmp_path / "big.zip")
    assert files_in() == {DETECTOR}


def test_the_second_source_is_used_when_the_first_is_down(get_data, server, pack, rows, files_in):
    server.answers["/second.zip"] = Answer(pack(rows, "course"))
    get_data()
    assert server.requests == ["/yunet.onnx", "/first.zip", "/second.zip", "/mnist.npz"]
    assert "test_with_emotions.csv" in files_in()


def test_a_silent_server_is_given_up(get_data, server, pack, rows, files_in, capsys):
    body = pack(rows)
    server.answers["/first.zip"] = Answer(body[:5000], length=len(body), then_hang=True)
    server.answers["/second.zip"] = Answer(body)
    get_data("--timeout", "2")
    assert f"cannot download {server.url}/first.zip: timed out" in capsys.readouterr().err
    assert "train.csv" in files_in()


@pytest.fixture
def unlabelled(pack, rows):
    """A zip with train.csv and test.csv: everything that training needs, but no labels of the test rows."""
    buffer = io.BytesIO(pack(rows))
    with zipfile.ZipFile(buffer) as full, zipfile.ZipFile(part := io.BytesIO(), "w") as file:
        for name in ("emotions-detector/train.csv", "emotions-detector/test.csv"):
            file.writestr(name, full.read(name))
    return part.getvalue()


def test_missing_test_labels_are_told(get_data, server, unlabelled, files_in, tmp_path, capsys):
    (tmp_path / "some.zip").write_bytes(unlabelled)
    get_data("--archive", tmp_path / "some.zip")
    assert files_in() == {"train.csv", "test.csv", DETECTOR}
    assert len(utils.load_fer2013("train", tmp_path / "data")[1]) == 210
    note = capsys.readouterr().err
    for words in ("the test set is missing", "predict.py cannot compute the accuracy", "icml_face_data.csv", "kaggle"):
        assert words in note


def test_an_archive_without_test_labels_is_completed_by_the_second_source(
    get_data, server, unlabelled, pack, rows, files_in, capsys
):
    server.answers["/first.zip"] = Answer(unlabelled)
    server.answers["/second.zip"] = Answer(pack(rows, "one file"))
    get_data()
    assert files_in() == {"train.csv", "test.csv", "icml_face_data.csv", DETECTOR}
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["by_hand.zip", "fer2013.tar.gz"])
def test_an_archive_is_used_instead_of_the_network(name, get_data, server, pack, rows, files_in, tmp_path):
    archive = tmp_path / "downloads" / name
    write_layout(rows, archive.parent, "original")
    if name == "by_hand.zip":
        archive.write_bytes(pack(rows))
    before = archive.read_bytes()
    get_data("--archive", archive)
    assert server.requests == ["/yunet.onnx", "/mnist.npz"]
    assert files_in() >= ({"train.csv"} if name == "by_hand.zip" else {"fer2013.tar.gz"})
    assert archive.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file at .*mine.zip; expected the downloaded zip, or fer2013.tar.gz"),
        (b"", "mine.zip: it is not a whole .zip or .tar.gz file"),
        (b"emotion,pixels\n", "mine.zip: it is not a whole .zip or .tar.gz file .*emotion,pixels"),
        ("a zip of something else", "mine.zip: no FER2013 in it; expected one of .*train.csv"),
    ],
)
def test_a_wrong_archive_is_named(content, words, get_data, files_in, tmp_path):
    archive = tmp_path / "mine.zip"
    if isinstance(content, bytes):
        archive.write_bytes(content)
    elif content:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("holiday.jpg", "sand")
    with pytest.raises(utils.InputError, match=words):
        get_data("--archive", archive)
    assert files_in() == {DETECTOR}


def test_a_wrong_archive_does_not_touch_what_is_there(get_data, pack, rows, files_in, tmp_path):
    train = [row for row in rows if row[1] == "Training"]
    write_layout(train, tmp_path / "data", "one file")
    before = (tmp_path / "data" / "icml_face_data.csv").read_bytes()
    (tmp_path / "mine.zip").write_bytes(pack(rows[:-1], "one file"))
    with pytest.raises(utils.InputError, match="69 rows"):
        get_data("--archive", tmp_path / "mine.zip")
    assert (tmp_path / "data" / "icml_face_data.csv").read_bytes() == before
    assert files_in() == {"icml_face_data.csv", DETECTOR}


def test_a_broken_file_that_an_archive_does_not_replace_is_named(get_data, rows, tmp_path):
    archive = tmp_path / "downloads" / "fer2013.tar.gz"
    write_layout(rows, archive.parent, "original")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("emotion,pixels\n")
    with pytest.raises(utils.InputError, match="; delete train.csv, which is read first"):
        get_data("--archive", archive)
    (tmp_path / "data" / "train.csv").unlink()
    get_data("--archive", archive)


def test_a_broken_file_in_the_folder_is_replaced(get_data, server, pack, rows, tmp_path):
    server.answers["/first.zip"] = Answer(pack(rows))
    get_data()
    path = tmp_path / "data" / "train.csv"
    path.write_bytes(path.read_bytes()[:100_000])
    get_data()
    assert len(utils.load_fer2013("train", tmp_path / "data")[1]) == 210
    assert not list((tmp_path / "data").glob("*.old*"))


def test_an_edited_file_in_the_folder_is_kept_under_another_name(get_data, server, pack, rows, tmp_path, capsys):
    server.answers["/first.zip"] = Answer(pack(rows))
    get_data()
    path = tmp_path / "data" / "train.csv"
    edited = b"\n".join(path.read_bytes().splitlines()[:-1]) + b"\n"
    path.write_bytes(edited)
    get_data()
    assert len(utils.load_fer2013("train", tmp_path / "data")[1]) == 210
    assert path.with_name("train.csv.old1").read_bytes() == edited
    assert "kept as train.csv.old1" in capsys.readouterr().err


@pytest.mark.parametrize("body", [None, b"another model", b""])
def test_without_yunet_the_haar_cascade_is_announced(body, get_data, server, files_in, tmp_path, capsys):
    broken = tmp_path / "data" / DETECTOR
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half of it")
    server.answers["/yunet.onnx"] = None if body is None else Answer(body)
    get_data("--only-detector")  # and no error
    assert files_in() == set()
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and notes[0].startswith("note: ") and "Haar cascade" in notes[0]


def test_only_detector_asks_for_nothing_else(get_data, server, files_in):
    get_data("--only-detector")
    assert server.requests == ["/yunet.onnx"] and files_in() == {DETECTOR}


def test_a_user_without_network_reads_one_note_and_one_error(run_script, server, tmp_path):
    (tmp_path / "mine.zip").write_bytes(b"<html>")
    flags = ("--data", "data", "--archive", "mine.zip", "--detector-source", "http://127.0.0.1:1/yunet.onnx")
    process = run_script("get_data.py", *flags)
    note, error = [line for line in process.stderr.splitlines() if line.startswith(("note: ", "error: "))]
    assert "Traceback" not in process.stderr
    assert process.returncode == 1
    assert note.startswith("note: cannot download http://127.0.0.1:1/yunet.onnx") and "Haar" in note
    assert error.startswith("error: mine.zip: it is not a whole .zip or .tar.gz file")


def test_ctrl_c_leaves_nothing(server, files_in, tmp_path):
    server.answers["/yunet.onnx"] = Answer(YUNET, length=10_000, then_hang=True)
    flags = ["--only-detector", "--data", tmp_path / "data", "--detector-source", f"{server.url}/yunet.onnx"]
    unmute = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a job in the background ignores Ctrl-C)
    process = subprocess.Popen([sys.executable, SCRIPT, *flags], stderr=subprocess.PIPE, text=True, preexec_fn=unmute)
    try:
        while not any(name.endswith("/download") for name in files_in()) and process.poll() is None:  # the half file
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1].endswith("interrupted\n")
    finally:
        process.kill()
    assert process.returncode == 130
    assert not os.listdir(tmp_path / "data" / "models")


@pytest.fixture
def get_digits(script, server, tmp_path, monkeypatch):
    """Run get_digits() with the twenty digits taken for MNIST; return its folder."""
    monkeypatch.setattr(script, "MNIST_SHA256", hashlib.sha256(MNIST).hexdigest())

    def run():
        script.get_digits(f"{server.url}/mnist.npz", tmp_path / "digits", 30.0)
        return tmp_path / "digits"

    return run


def test_mnist_stands_in_for_kaggles_digits(get_digits, capsys):
    """Every digit is there once, in one of the two files; those with a label have their own."""
    folder = get_digits()
    train, test = (pd.read_csv(folder / name) for name in ("train.csv", "test.csv"))
    pixels = [f"pixel{i}" for i in range(784)]
    assert train.columns.tolist() == ["label", *pixels] and test.columns.tolist() == pixels
    assert len(train) == 12 and sorted([*train["pixel0"], *test["pixel0"]]) == list(range(20))
    assert (train["pixel0"] % 10 == train["label"]).all() and (train["pixel783"] == train["pixel0"]).all()
    assert {path.name for path in folder.iterdir()} == DIGIT_FILES
    assert "kaggle.com" in capsys.readouterr().out


def test_digits_that_are_there_are_left_alone(get_digits, server, capsys, tmp_path):
    """Also where one of the two files is missing."""
    (tmp_path / "digits").mkdir()
    for name in ("train.csv", "test.csv"):
        (tmp_path / "digits" / name).write_text("Kaggle's own")
        assert {path.read_text() for path in get_digits().iterdir()} == {"Kaggle's own"}
        told = capsys.readouterr()
        assert ("train.csv is there without the other" in told.err) == (name == "train.csv")
    assert "/mnist.npz" not in server.requests


@pytest.mark.parametrize("answer", [None, Answer(MNIST[:-9] + b"otherwise"), Answer(MNIST, length=len(MNIST) + 9)])
def test_without_digits_it_says_where_they_are_and_leaves_nothing(get_digits, server, capsys, answer):
    server.answers["/mnist.npz"] = answer
    assert not list(get_digits().iterdir())
    message = capsys.readouterr().err
    assert message.startswith("note: ") and message.count("\n") == 1 and "kaggle.com/c/digit-recognizer" in message
