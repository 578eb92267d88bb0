"""Whatever a file holds and whatever is typed: a result, or one line that says what is wrong.

A few hundred examples each, the same every time; `make fuzz` tries others, and a hundred times as many.
"""

import argparse
import io
import os
import shutil
import sys
import tarfile
import zipfile
from contextlib import redirect_stderr, redirect_stdout

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils
from tests.code.test_data import GOOD
from tests.code.test_video import numbered_frames, write_container
from tests.conftest import load_script

COUNT = int(os.environ.get("FUZZ", 0))
always = {"deadline": None, "suppress_health_check": list(HealthCheck)}
few = settings(max_examples=COUNT or 50, derandomize=not COUNT, **always)
many = settings(max_examples=COUNT or 300, derandomize=not COUNT, **always)

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")  # in an archive
SHIPPED = utils.MODEL.with_suffix(".tflite").read_bytes()
MODULES = {path.stem: load_script(path.stem) for path in sorted((utils.ROOT / "scripts").glob("*.py"))}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory, small_fer2013):
    """A folder of its own, the current one, with a file of every kind that the scripts take and a few that they do not.

    The project's own data, results and runs are in it too. What takes seconds, or leads out of it, is refused.
    """
    folder = tmp_path_factory.mktemp("fuzz")
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    write_container(folder / "video.mp4", "mp4v", numbered_frames(4))
    write_container(folder / "50%s {}.mp4", "mp4v", numbered_frames(4))
    for suffix in ("jpg", "png", "webp", "tiff", "bmp", "gif"):
        cv2.imwrite(str(folder / f"picture.{suffix}"), frame)
    shutil.copytree(small_fer2013, folder / "data")
    if utils.YUNET.is_file():
        shutil.copytree(utils.YUNET.parent, folder / "data" / "models")
    (folder / "model.tflite").write_bytes(SHIPPED)
    (folder / "list.txt").write_text("video.mp4\nmissing.mp4\n")
    (folder / "text.csv").write_text("no table")
    (folder / "link.mp4").symlink_to("video.mp4")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.mp4")

    def refuse(*arguments, **options):
        raise utils.InputError("this is as far as the test goes")

    opened = cv2.VideoCapture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cv2, "VideoCapture", lambda source, *more: opened() if type(source) is int else opened(source, *more)
        )
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setattr(utils, "_end_like_ctrl_c", lambda: None)  # the signals of pytest stay as they are
        patch.setattr(utils, "DATA", folder / "data")
        patch.setattr(utils, "YUNET", folder / "data" / utils.YUNET.relative_to(utils.ROOT / "data"))
        patch.setattr(utils, "RUNS", folder / "runs")
        patch.setattr(utils, "CLIP", folder / "video.mp4")
        patch.setattr(utils, "load_model", refuse)
        patch.setattr(utils, "_try_in_child", refuse)
        patch.setattr(MODULES["predict_live_stream"], "Window", refuse)
        patch.setattr(MODULES["annotate_videos"], "complete", refuse)
        patch.setattr(MODULES["get_data"], "download", refuse)
        for name in ("train", "train_pretrained"):
            patch.setattr(MODULES[name], "build_model", refuse)
        patch.setattr(MODULES["train"].training, "fast_precision", lambda: "float32")
        yield folder


def result_or_input_error(read, *arguments):
    """Return what `read` returns, or None after an InputError of one line; another exception fails the test."""
    try:
        return read(*arguments)
    except utils.InputError as error:
        assert "\n" not in str(error) and str(error)


@st.composite
def damaged(draw, content):
    """Bytes like `content`: parts of it are removed, written twice or overwritten, and it may end early."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        end = start + draw(st.sampled_from([0, 1, 2, 4, 8, 100, len(content)]))
        content[start:end] = draw(st.binary(max_size=8) | st.just(bytes(content[start:end]) * 2))
    return bytes(content)


# ------------------------------------------------------------------------------------------------------- readers

CELLS = st.sampled_from(["0", "6", "7", "-1", "3.0", "", " ", '"', "Training", "PublicTest", "pixels", "\0", "é"])
ROW = st.lists(CELLS | st.text(max_size=5) | st.just(GOOD), max_size=4).map(",".join)
HEADER = st.sampled_from(["emotion,pixels", "pixels", "emotion, Usage, pixels", "emotion,pixels,Usage", ",a,pixels"])
TABLE = st.tuples(HEADER | ROW, st.lists(ROW, max_size=4), st.sampled_from(["\n", "\r\n", "\r", "\n\n"])).map(
    lambda parts: parts[2].join([parts[0], *parts[1]])
)
ENCODED = st.tuples(TABLE, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])).map(
    lambda pair: pair[0].encode(pair[1], "replace")
)
GOOD_TABLE = "emotion, Usage, pixels\n" + "".join(f"3,{usage},{GOOD}\n" for usage in utils.FER2013_CLASS_COUNTS)


@many
@given(ENCODED | damaged(GOOD_TABLE.encode()))
def test_a_csv_file(folder, content):
    (folder / "faces.csv").write_bytes(content)
    table = result_or_input_error(utils.read_fer2013_csv, folder / "faces.csv")
    if table:
        images, labels, usages = table
        assert images.shape[1:] == (48, 48) and images.dtype == np.uint8
        assert all(part is None or len(part) == len(images) > 0 for part in (labels, usages))


NAMES = st.sampled_from(sorted(MODULES["get_data"].FILES)) | st.sampled_from(
    ["../train.csv", "/train.csv", "C:\\train.csv", "a/../../fer2013.csv", "train.csv/", "a\\b/fer2013.csv", "é.csv"]
)
MEMBERS = st.lists(
    st.tuples(NAMES | st.text(min_size=1, max_size=6), st.just(GOOD_TABLE.encode()) | ENCODED), max_size=3
)


def write_zip(members):
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name.replace("\0", "0"), content)
    return file.getvalue()


def write_tar(members, kind):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz", compresslevel=1) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "nowhere"
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
ARCHIVES = MEMBERS.map(write_zip) | st.builds(write_tar, MEMBERS, KINDS)


@many
@given(ARCHIVES | ARCHIVES.flatmap(damaged), st.sampled_from(["zip", "tar.gz", "csv"]))
def test_an_archive(folder, content, suffix):
    """It has none of the published numbers of faces: so it is refused, and nothing of it is left."""
    (folder / "inside").mkdir(exist_ok=True)
    (folder / f"archive.{suffix}").write_bytes(content)
    before = {*folder.iterdir(), *folder.parent.iterdir()}
    with redirect_stdout(io.StringIO()), pytest.raises(utils.InputError) as error:
        MODULES["get_data"].add_archive(folder / f"archive.{suffix}", "archive", folder / "inside")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert {*folder.iterdir(), *folder.parent.iterdir()} == before and not list((folder / "inside").iterdir())


@many
@given(ARCHIVES | ARCHIVES.flatmap(damaged))
def test_a_tar_file_in_the_data_folder(folder, content):
    (folder / "fer2013.tar.gz").write_bytes(content)
    result_or_input_error(utils.read_fer2013_csv, folder / "fer2013.tar.gz")


class Network:
    """In place of OpenCV's, which can crash on a damaged file, and is asked in another process."""

    def setInput(self, blob):
        pass

    def forward(self):
        return np.full((1, 7), 1 / 7, np.float32)


# What is drawn is small, since Hypothesis keeps it: other numbers in the first bytes of a file or in its last ones,
# which tell of its tables; and where it ends.
PLACES_IN_MODEL = st.integers(0, 100) | st.integers(-5004, -4)
DAMAGES = st.lists(st.tuples(PLACES_IN_MODEL, st.binary(min_size=4, max_size=4)), max_size=3)
ENDS = st.sampled_from([len(SHIPPED), 0, 3, 50, len(SHIPPED) // 2])


@many
@given(DAMAGES, ENDS)
def test_the_header_of_a_tflite_file(folder, damages, end):
    content = bytearray(SHIPPED)
    for place, number in damages:
        place %= len(content)
        content[place : place + 4] = number
    (folder / "damaged.tflite").write_bytes(content[:end])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv2.dnn, "readNetFromTFLite", lambda content: Network())
        result_or_input_error(lambda: utils.EmotionNet(folder / "damaged.tflite", trusted=True))


@many
@given(st.data())
def test_a_picture(folder, data):
    path = folder / f"picture.{data.draw(st.sampled_from(['jpg', 'png', 'webp', 'tiff', 'bmp', 'gif']))}"
    (folder / "damaged").write_bytes(data.draw(damaged(path.read_bytes())))
    picture = result_or_input_error(utils.read_picture, folder / "damaged")
    assert picture is None or (picture.dtype == np.uint8 and picture.shape[2:] == (3,))


# -------------------------------------------------------------------------------------------------- command lines


def options_of(module):
    """Return the options that the parser of a script has, as argparse's actions."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv: found.extend(parser._actions))
        module.parse_args([])
    return [option for option in found if option.dest != "help"]


# Texts without a slash, so that whatever is written is written here.
PLAIN = st.text(st.characters(exclude_characters="/\\~\0", codec="utf-8"), max_size=8)
FILES = "video.mp4|50%s {}.mp4|link.mp4|pipe.mp4|picture.png|text.csv|list.txt|model.tflite|missing.mp4".split("|")
PLACES = "data|runs|data/train.csv|.|| |new|new/er|text.csv/below|new.csv|new.mp4".split("|")
ODD = [*"-|--|-v.mp4|%s|{}|{0}.mp4|end.mp4 |[a|*.mp4|new\nline.csv|caf\udce9.mp4".split("|"), "a" * 300]
ADDRESSES = "http://127.0.0.1:1/|rtsp://127.0.0.1:1/x|http:|tcp://127.0.0.1:1|99999|0|~/video.mp4".split("|")
TEXT = st.sampled_from(FILES + PLACES + ODD + ADDRESSES) | PLAIN
NUMBER = st.sampled_from(["0", "1", "-1", "nan", "inf", "-inf", "1e308", "1e-320", "0x1", "", "1_0", "٣"])
NUMBER |= st.integers().map(str) | st.floats().map(str)


@st.composite
def command_line(draw, options):
    """Words for a script: some of its options, with values of their kind more often than not."""
    words = []
    for option in draw(st.lists(st.sampled_from(options), max_size=5)):
        name = draw(st.sampled_from(option.option_strings))
        value = draw(NUMBER if option.type in (int, float) and draw(st.integers(0, 9)) else TEXT)
        if option.nargs == 0 or isinstance(option, argparse.BooleanOptionalAction):
            words.append(name)
        elif option.nargs == "+":
            words += [name, value, *draw(st.lists(TEXT, max_size=2))]
        else:
            words += draw(st.sampled_from([[name, value], [f"{name}={value}"]]))
    return words + draw(st.sampled_from([[]] * 9 + [["--nonsense"]]))


@pytest.mark.parametrize("name", MODULES)
@few
@given(st.data())
def test_a_command_line(folder, name, data):
    module = MODULES[name]
    words = data.draw(command_line(options_of(module)))
    with redirect_stderr(io.StringIO()) as errors, redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        utils.run_script(module.main, lambda: module.parse_args(words))
        sys.exit(0)
    code, lines = end.value.code, errors.getvalue().splitlines()
    if isinstance(code, str):  # which Python writes to stderr, and exits with 1
        assert code.startswith("error: ") and code.isprintable() and len(code) <= utils.LONGEST_LINE
    elif code:
        assert code == 2 and ": error: " in lines[-1]
    assert not any("Traceback" in line for line in lines)
