"""`python scripts/predict.py`, as a user runs it."""

import json
import re

import numpy as np
import pytest

import utils
from tests.conftest import assert_one_clear_line, needs_test_set
from tools import times


def test_prints_one_line_with_the_accuracy(run_script, small_fer2013):
    process = run_script("predict.py", "--data", small_fer2013)
    images, labels = utils.load_fer2013("test", small_fer2013)
    net = utils.EmotionNet()
    accuracy = np.mean(net.predict(images).argmax(axis=1) == labels)
    assert process.stdout == f"Accuracy on test set: {accuracy:.0%}\n"
    assert process.returncode == 0 and process.stderr == ""


def test_verbose_tells_the_halves_and_the_emotions(run_script, small_fer2013):
    lines = run_script("predict.py", "--data", small_fer2013, "--verbose").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["test set", "PublicTest", "PrivateTest", *utils.EMOTIONS]
    hits = {name: int(re.search(rf"{name} .* (\d+) of", "\n".join(lines))[1]) for name in ("test set", "PublicTest")}
    private = int(re.search(r"PrivateTest .* (\d+) of 35", "\n".join(lines))[1])
    assert hits["PublicTest"] + private == hits["test set"]


@pytest.fixture
def reported():
    """The accuracy that 05_evaluation wrote, 0 to 1."""
    return json.loads((utils.RESULTS / "evaluation.json").read_text())["accuracy"]["all of the test set"]["value"]


@needs_test_set
def test_the_model_passes_the_bar_on_a_thousand_faces(run_script, reported, tmp_path):
    images, labels = (part[::7] for part in utils.load_fer2013("test"))
    rows = (
        f"{label},PublicTest,{' '.join(map(str, image.ravel()))}\n" for image, label in zip(images, labels, strict=True)
    )
    (tmp_path / "icml_face_data.csv").write_text("emotion, Usage, pixels\n" + "".join(rows))
    process = run_script("predict.py", "--data", tmp_path)
    accuracy = int(re.fullmatch(r"Accuracy on test set: (\d\d)%\n", process.stdout)[1])
    assert accuracy > 60
    assert accuracy == pytest.approx(100 * reported, abs=4.5)  # three standard errors of 1,000


@needs_test_set
def test_the_model_is_the_one_that_was_reported(run_script, reported):
    process = run_script("predict.py")
    assert process.stdout == f"Accuracy on test set: {reported:.0%}\n", process.stderr
    assert reported > 0.7  # which the course asks for


def test_the_readme_shows_the_figures_that_the_runs_wrote():
    readme = (utils.ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("05_evaluation.ipynb -->")[1].split("<!-- end of results -->")[0]
    evaluation = json.loads((utils.RESULTS / "evaluation.json").read_text())
    benchmark = json.loads((utils.RESULTS / "benchmark.json").read_text())
    for name in ("all of the test set", "PrivateTest", "without the test faces that are in train.csv too"):
        cut = evaluation["accuracy"][name]
        assert f" | {cut['value']:.1%} ({cut['low']:.1%} to {cut['high']:.1%}) |" in table
    whole = evaluation["accuracy"]["all of the test set"]
    first_screen = " ".join(readme.split("## ")[0].split())
    assert f"right on {whole['value']:.1%} of {whole['images']:,} test faces" in first_screen
    assert f" | {evaluation['calibration error']:.1%} |" in table
    assert f" | {benchmark['first answer s']:.2f} s |" in table
    assert f" | {benchmark['median ms a frame']:.1f} ms |" in table


def test_the_readme_shows_the_times_that_were_measured():
    text = times.README.read_text(encoding="utf-8")
    table = times.write_table(json.loads(times.RESULT.read_text()))
    assert utils.fill_in(text, "times", table) == text, "the README is out of date: run `make times`"


def test_bad_input_is_one_clear_line(call_script, tmp_path, small_fer2013):
    (tmp_path / "letter").mkdir()
    text = (small_fer2013 / "icml_face_data.csv").read_text().splitlines()
    text[3] = text[3].replace(" ", " 1x2 ", 1)
    (tmp_path / "letter" / "icml_face_data.csv").write_text("\n".join(text))
    (tmp_path / "half.pkl").write_bytes(utils.MODEL.read_bytes()[:9999])
    for arguments, words in [
        (["--data", tmp_path / "nothing"], ["no test set", "make data"]),
        (["--data", tmp_path / "letter"], ["icml_face_data.csv, line 4", "'1x2'", "0 to 255"]),
        (["--data", small_fer2013, "--model", "none.pkl"], ["none.pkl", "train.py"]),
        (["--data", small_fer2013, "--model", tmp_path / "half.pkl"], ["half.pkl", "not a whole"]),
    ]:
        process = call_script("predict.py", *arguments)
        assert_one_clear_line(process, *words)
        assert process.stdout == ""
