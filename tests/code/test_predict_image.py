"""`python scripts/predict.py --image`, as a user runs it on pictures of every kind, and `utils.read_emotions`."""

import io
import itertools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import utils
from tests.conftest import assert_one_clear_line, execute_notebook

ANSWER = rf"({'|'.join(utils.EMOTIONS)}) , \d{{1,3}}%"
ORIENTATION = 0x0112  # EXIF's tag; 6 is a phone held upright, 1 to 8 are all there are


@pytest.fixture(scope="module")
def frames():
    """Three frames of the bundled clip, (480, 640, 3) uint8 BGR: one person who smiles, two people, and nobody."""
    times = {"one": 2.0, "two": 10.0, "nobody": 13.6}
    found = types.SimpleNamespace()
    for seconds, frame in utils.Video(utils.CLIP):
        for name in [name for name, time in times.items() if not hasattr(found, name) and seconds >= time - 1e-6]:
            setattr(found, name, frame)
    return found


@pytest.fixture
def write(tmp_path):
    """Write a frame to a file in a temporary folder and return its path."""

    def write(frame, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        cv2.imencode(path.suffix or ".jpg", frame)[1].tofile(path)
        return path

    return write


@pytest.fixture
def tell(run_script):
    """Run the script on pictures, without the notice that YuNet is missing."""

    def tell(*arguments, **environment):
        process = run_script("predict.py", "--image", *arguments, **environment)
        process.stderr = "".join(line for line in process.stderr.splitlines(True) if "Haar" not in line)
        return process

    return tell


def test_a_line_for_every_face(tell, write, frames):
    for name in ("one", "two", "nobody"):
        write(getattr(frames, name), f"{name}.png")
    process = tell("one.png", "two.png", "nobody.png")
    one, first, second, none = process.stdout.splitlines()
    assert re.fullmatch(rf"one\.png : {ANSWER}", one) and "Happy" in one
    assert re.fullmatch(rf"two\.png : face 1 : {ANSWER}", first)
    assert re.fullmatch(rf"two\.png : face 2 : {ANSWER}", second)
    assert none == "nobody.png : no face"
    assert (process.returncode, process.stderr) == (0, "")
    expected = utils.read_emotions(frames.two)
    for line, (_, probabilities) in zip((first, second), expected, strict=True):
        assert line.endswith(f" : {utils.EMOTIONS[probabilities.argmax()]} , {probabilities.max():.0%}")


def test_it_does_not_wait_for_tensorflow(write, frames, tmp_path):
    arguments = ["predict.py", "--image", str(write(frames.one, "me.jpg")), "--output", str(tmp_path / "out")]
    code = (
        f"import sys, runpy; sys.argv = {arguments!r}\n"
        f"try: runpy.run_path({str(utils.ROOT / 'scripts' / 'predict.py')!r}, run_name='__main__')\n"
        "finally: print(sorted({'tensorflow', 'keras', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.fullmatch(rf".*me\.jpg : {ANSWER}\n\[\]\n", process.stdout), process.stdout + process.stderr


def save(image, kind, **options):
    """Return the bytes of a PIL image as a file of a kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind, transparent", [("JPEG", False), *itertools.product(["PNG", "WEBP"], [False, True])])
def test_a_picture_is_turned_as_its_exif_data_say(kind, transparent, frames, tmp_path):
    frame = cv2.resize(frames.one, (160, 120), interpolation=cv2.INTER_AREA)
    opaque = np.full((120, 160), 255, np.uint8)
    opaque[:, :30] = 0
    image = Image.fromarray(frame[..., ::-1])
    if transparent:
        image.putalpha(Image.fromarray(opaque))
        frame[:, :30] = 255
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options = {} if kind == "PNG" else {"quality": 95}
        (tmp_path / "me").write_bytes(save(image, kind, exif=exif, **options))
        shown = Image.fromarray(frame[..., ::-1])
        shown.getexif()[ORIENTATION] = orientation
        expected = np.array(ImageOps.exif_transpose(shown))[..., ::-1].astype(int)
        picture = utils.read_picture(tmp_path / "me")
        assert picture.shape == expected.shape and np.abs(picture - expected).mean() < 4, orientation


def files_of_every_kind(frame):
    """Yield name, bytes, and the expected (h, w, 3) uint8 BGR for a frame in many kinds of files."""
    grey = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    image, deep = Image.fromarray(frame[..., ::-1]), frame.astype(np.uint16) * 257
    opaque = np.where(np.arange(640) < 100, 0, 255).astype(np.uint8)[None].repeat(480, 0)
    with_alpha = image.copy()
    with_alpha.putalpha(Image.fromarray(opaque))
    white = np.where(opaque[..., None] == 0, np.uint8(255), frame)
    deep_alpha = np.dstack([deep, opaque.astype(np.uint16) * 257])
    yield "grey.jpg", save(image.convert("L"), "JPEG"), grey
    yield "grey16.png", cv2.imencode(".png", deep[..., 1])[1].tobytes(), np.dstack([frame[..., 1]] * 3)
    yield "colour16.png", cv2.imencode(".png", deep)[1].tobytes(), frame
    yield "colour16.tiff", cv2.imencode(".tiff", deep)[1].tobytes(), frame
    yield "alpha16.png", cv2.imencode(".png", deep_alpha)[1].tobytes(), white
    yield "alpha.tiff", save(with_alpha, "TIFF"), white
    yield "alpha.webp", save(with_alpha, "WEBP", quality=95), white
    grey_alpha = image.convert("L")
    grey_alpha.putalpha(Image.fromarray(opaque))
    yield "grey_alpha.png", save(grey_alpha, "PNG"), np.where(opaque[..., None] == 0, np.uint8(255), grey)
    yield "cmyk.jpg", save(image.convert("CMYK"), "JPEG", quality=95), frame
    yield "cmyk.tiff", save(image.convert("CMYK"), "TIFF"), frame
    yield "palette.png", save(image.quantize(256), "PNG"), frame
    yield "several.gif", save(image, "GIF", save_all=True, append_images=[image.rotate(180)]), frame
    yield "progressive.jpg", save(image, "JPEG", progressive=True), frame
    yield "plain.bmp", save(image, "BMP"), frame


def test_every_kind_of_file_is_read_as_a_viewer_shows_it(frames, tmp_path, capfd):
    for name, content, expected in files_of_every_kind(frames.one):
        path = tmp_path / name
        path.write_bytes(content)
        picture = utils.read_picture(path)
        assert picture.dtype == np.uint8 and picture.shape == expected.shape, name
        assert np.abs(picture.astype(int) - expected).mean() < 5, name
        (_, probabilities), *others = utils.read_emotions(path)
        assert utils.EMOTIONS[probabilities.argmax()] == "Happy" and not others, name
    assert capfd.readouterr().err == ""


def test_half_transparent_pixels_are_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 0, 51)).save(tmp_path / "glass.png")
    assert utils.read_picture(tmp_path / "glass.png")[0, 0] == pytest.approx([204, 224, 244], abs=1)  # BGR, 20 %


def test_a_folder_a_pattern_and_the_home_folder(tell, write, frames, tmp_path):
    for name in ("album/b.PNG", "album/a.jpg", "album/.hidden.png", "album/inner/c.jpg", "album[1]/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(frames.one, name)
    (tmp_path / "album" / "notes.txt").write_text("of the holiday")
    (tmp_path / "album" / "._a.jpg").write_bytes(b"what a Mac leaves on other disks")

    def names(*arguments):
        process = tell(*arguments, HOME=str(tmp_path), USERPROFILE=str(tmp_path))
        assert (process.returncode, process.stderr) == (0, "")
        return [line.rsplit(" : ", 1)[0] for line in process.stdout.splitlines()]

    paths = ("album/a.jpg", "album/b.PNG", "album/inner/c.jpg", "album[1]/d.jpg")
    a, b, c, d = (str(Path(path)) for path in paths)
    assert names("album") == [a, b]
    assert names("album[1]") == [d]
    assert names("alb*/*.jpg") == [a, d]
    assert names("album/**/*.jpg", "--image", b) == [a, c, b]
    assert names("album", a, "album/*.jpg") == [a, b]  # each picture once
    assert names("~/album/a.jpg") == [str(tmp_path / a)]


def test_what_cannot_be_read_does_not_stop_the_others(tell, write, frames, tmp_path):
    whole = write(frames.one, "whole.png").read_bytes()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling.png").symlink_to("gone.png")
    bad = ["text.png", "half.png", "nothing.png", "missing.png", "none*.png", "folder", "dangling.png", utils.CLIP]
    process = tell(*bad, "whole.png", "--output", "out")
    assert re.fullmatch(rf"whole\.png : {ANSWER}\n", process.stdout)
    told = "8 of 9 pictures cannot be read (text.png, half.png, nothing.png, missing.png, none*.png, folder, "
    assert_one_clear_line(process, told, "): no picture at text.png: ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole_emotions.png"]
    for name in (*bad, ""):
        process = tell(name)
        assert_one_clear_line(process, f"no picture in {name or '.'}: " if name in ("folder", "") else f"at {name}: ")
        assert process.stdout == ""
    process = tell(*(f"{'long' * 50}{number}.png" for number in range(99)))
    assert_one_clear_line(process, "99 of 99 pictures cannot be read (longlong", "there is no such file")
    assert len(process.stderr) <= 300


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow fewer names")
def test_unusual_names(tell, write, frames, tmp_path):
    latin = os.fsdecode(b"caf\xe9 1.jpg")  # not UTF-8
    for name in (latin, " two  blanks .jpg", "-dash.jpg", "me[1].jpg", "new\nline\x1b[31m.jpg", "Юля.jpg", "no_suffix"):
        write(frames.one, name)
    for argument, shown in [
        (latin, r"caf\udce9 1.jpg"),
        (" two  blanks .jpg", " two  blanks .jpg"),
        ("./-dash.jpg", "-dash.jpg"),
        ("me[1].jpg", "me[1].jpg"),
        ("new\nline\x1b[31m.jpg", r"new\nline\x1b[31m.jpg"),
        ("Юля.jpg", "Юля.jpg"),
        ("no_suffix", "no_suffix"),
    ]:
        process = tell(argument, "--output", "out")
        assert process.stdout.startswith(f"{shown} : Happy , "), process.stdout + process.stderr
        assert process.returncode == 0 and process.stdout.count("\n") == 1
    assert len(list((tmp_path / "out").iterdir())) == 7
    assert cv2.imdecode(np.fromfile(tmp_path / "out" / os.fsdecode(b"caf\xe9 1_emotions.png"), np.uint8), 1) is not None
    (tmp_path / latin).write_text("no picture")
    assert_one_clear_line(tell(latin), r"caf\udce9 1.jpg")
    assert tell("Юля.jpg", PYTHONIOENCODING="ascii").stdout.startswith(r"\u042e\u043b\u044f.jpg : Happy , ")
    process = tell(".")
    assert "-dash.jpg : Happy" in process.stdout and "no_suffix" not in process.stdout


def test_a_name_that_begins_with_a_dash_can_be_given_as_it_is(run_script, write, frames):
    write(frames.one, "-v.jpg")
    assert re.search(rf"^-v\.jpg : {ANSWER}$", run_script("predict.py", "--image=-v.jpg").stdout)


def test_the_written_picture_has_the_boxes_and_the_bars(tell, write, frames, tmp_path):
    write(frames.two, "two.png")
    write(cv2.resize(frames.two, (4000, 3000)), "large.jpg")
    write(frames.nobody, "nobody.png")
    process = tell("two.png", "large.jpg", "nobody.png", "--output", "new/out")
    assert process.returncode == 0, process.stderr
    out = tmp_path / "new" / "out"
    two, large, nobody = (cv2.imread(str(out / f"{name}_emotions.png")) for name in ("two", "large", "nobody"))
    assert two.shape == (480, 640 + 230, 3)
    assert large.shape == (1080, 1440 + 518, 3)
    assert (nobody[:, :640] == frames.nobody).all()
    (face, probabilities), (other, _) = utils.read_emotions(frames.two)
    for found, colour in ((face, utils.ACCENT), (other, utils.INK)):
        left, top, right, bottom = found.box
        middle = (top + bottom) // 2
        assert (two[middle, left] == colour).all() and (two[middle, right] == colour).all()
        x, y = round(left * 2.25), round(middle * 2.25)  # the same place in the large one
        assert (np.abs(large[y - 40 : y + 40, x - 20 : x + 20].astype(int) - colour).max(axis=2) < 3).any()
    inside = np.s_[face.box[1] + 3 : face.box[3] - 3, face.box[0] + 3 : face.box[2] - 3]
    assert (two[inside] == frames.two[inside]).all()
    bar = (two[:, 640 + 15 : 640 + 216] == utils.ACCENT).all(axis=2).sum(axis=1).max()
    assert bar == pytest.approx(200 * probabilities.max(), abs=2)


def test_an_output_is_never_an_input(tell, write, frames, tmp_path):
    me = write(frames.one, "me.png")
    before = me.read_bytes()
    assert tell("me.png", "--output", ".").returncode == 0
    assert me.read_bytes() == before and (tmp_path / "me_emotions.png").is_file()
    assert tell("me.png", "--output", ".").returncode == 0  # once more is no harm
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(*arguments):
        process = tell(*arguments)
        assert_one_clear_line(process, "me_emotions.png, one of the pictures")
        assert process.stdout == ""

    refused(".", "--output", ".")  # the folder now holds what was written, too
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    for link in (os.symlink, os.link):
        folder = tmp_path / link.__name__
        folder.mkdir()
        link(me, folder / "me_emotions.png")
        refused("me.png", "--output", folder)
        assert (folder / "me_emotions.png").samefile(me) and me.read_bytes() == before


def test_pictures_of_the_same_name_are_all_written(tell, write, frames, tmp_path):
    for name in ("a/me.png", "b/me.png", "b/Me.jpg"):
        write(frames.one if name[0] == "a" else frames.nobody, name)
    process = tell("a", "b", "--output", "out")
    assert process.returncode == 0, process.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Me_emotions_2.png", "me_emotions.png", "me_emotions_3.png"]
    first, last = (cv2.imread(str(tmp_path / "out" / f"me_emotions{number}.png")) for number in ("", "_3"))
    assert (last[:, :640] == frames.nobody).all() and not (first[:, :640] == frames.nobody).all()


def test_arguments_that_make_no_sense_are_one_clear_line(run_script, tell, write, frames, tmp_path):
    me = write(frames.one, "me.png")
    before = me.read_bytes()
    assert_one_clear_line(tell("me.png", "--output", "me.png"), "me.png is a file; expected a folder")
    assert_one_clear_line(tell("me.png", "--output", "new.jpg"), "--output is new.jpg", "expected a folder")
    assert_one_clear_line(run_script("predict.py", "--output", "out"), "--output", "--image")
    assert_one_clear_line(tell("me.png", "--model", "none.pkl"), "none.tflite", "train.py")
    assert me.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["me.png"]


def test_another_model_is_taken_with_its_pickle_s_name(tell, write, frames):
    write(frames.two, "two.png")
    other = utils.PRE_TRAINED_MODEL
    net = utils.EmotionNet(other.with_suffix(".tflite"))
    expected = [f"{probabilities.max():.0%}" for _, probabilities in utils.read_emotions(frames.two, net=net)]
    for path in (other, other.with_suffix(".tflite")):
        assert re.findall(r"\d+%", tell("two.png", "--model", path).stdout) == expected


def test_papermill_takes_one_picture_or_a_list(write, frames, tmp_path):
    """As `papermill -p image one.png` and as `papermill -y "image: [one.png, two.png]"`; the test set is left alone."""
    notebook = utils.ROOT / "notebooks" / "05_evaluation.ipynb"
    one, two = str(write(frames.one, "one.png")), str(write(frames.two, "two.png"))
    for image, lines in ((one, 1), ([one, two], 3)):
        parameters = {"image": image, "output": str(tmp_path / "out"), "data": str(tmp_path / "nowhere")}
        cells = execute_notebook(notebook, parameters, tmp_path / "executed.ipynb").cells
        printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
        assert len(re.findall(ANSWER, printed)) == lines, printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one_emotions.png", "two_emotions.png"]


def test_read_emotions_takes_paths_and_arrays(frames, write, tmp_path):
    path = write(frames.two, "two.png")
    pairs = utils.read_emotions(path)
    assert len(pairs) == 2 and pairs[0][0].side > pairs[1][0].side
    for face, probabilities in pairs:
        assert isinstance(face, utils.Face)
        assert probabilities.shape == (7,) and probabilities.sum() == pytest.approx(1, abs=1e-4)
    for image in (str(path), frames.two, cv2.cvtColor(frames.two, cv2.COLOR_BGR2BGRA)):
        for (face, probabilities), (other, others) in zip(utils.read_emotions(image), pairs, strict=True):
            assert face == other and probabilities == pytest.approx(others)
    assert utils.read_emotions(frames.nobody) == []
    crop = utils.crop_face(frames.two, pairs[0][0])
    ((face, probabilities),) = utils.read_emotions(crop)  # a face that was cut out already
    assert face.box == (0, 0, 48, 48) and probabilities == pytest.approx(pairs[0][1])
    with pytest.raises(utils.InputError, match="no picture at .*missing.jpg: there is no such file"):
        utils.read_emotions(tmp_path / "missing.jpg")
    with pytest.raises(utils.InputError, match="expected uint8"):
        utils.read_emotions(cv2.imread(str(tmp_path / "missing.jpg")))  # which is None


def test_the_lines_of_the_readme_work(frames, write, tmp_path):
    write(frames.one, "me.jpg")
    readme = (utils.ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("## From Python")[1].split("```python\n")[1].split("```")[0]
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(utils.ROOT)},
        capture_output=True,
        text=True,
    )
    assert re.fullmatch(r"\(\d+, \d+, \d+, \d+\) Happy \d+%\n", process.stdout), process.stderr
