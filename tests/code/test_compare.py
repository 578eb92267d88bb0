"""`make compare`: the README says what was measured, and a project that stops does not stop the others."""

import json
import sys

import numpy as np
import pytest

import utils
from tests.conftest import needs_yunet
from tools import compare

RESULT = utils.RESULTS / "compare.json"


def test_the_readme_says_what_was_measured():
    readme = (utils.ROOT / "README.md").read_text(encoding="utf-8")
    text = compare.describe(json.loads(RESULT.read_text(encoding="utf-8")))
    assert utils.fill_in(readme, "comparison", text) == readme, "the README is out of date: run `make compare`"


def test_ratios_are_of_what_was_measured_together():
    """Other work made everything three times as slow for a while."""
    names = list(compare.ROWS)
    ours, theirs = [10.0, 30.0, 10.0, 30.0, 10.0], [40.0, 120.0, 40.0, 40.0, 40.0]
    figures = {compare.OURS: {name: [*ours] for name in names}, "fer": {name: [*theirs] for name in names}}
    result = compare.summarise(figures, {"deepface": "no weights"})
    assert {*result["ratios"]} == {"fer"} and {*result["ratios"]["fer"].values()} == {4.0}
    assert result["projects"][compare.OURS]["import"] == 10 and result["stopped"] == {"deepface": "no weights"}


@needs_yunet
def test_projects_are_measured_in_processes_of_their_own_and_one_that_stops_is_told(tmp_path, astronaut):
    for name in ("first", *compare.SETS):
        np.save(tmp_path / f"{name}.npy", astronaut[None])
    np.save(tmp_path / "test.npy", np.zeros((2, utils.SIDE, utils.SIDE), np.uint8))
    np.save(tmp_path / "labels.npy", [7, 7])
    pythons = {compare.OURS: sys.executable, "fer": sys.executable}  # which this environment does not have
    figures, stopped = compare.measure(pythons, tmp_path, starts=2, rounds=1)
    assert stopped == {"fer": "ModuleNotFoundError: No module named 'fer'"} and {*figures} == {compare.OURS}
    ours = figures[compare.OURS]
    assert 0 < min(ours["import"]) < max(ours["first answer"]) and len(ours["import"]) == 2
    for name in compare.SETS:
        assert ours[f"{name}, faces"] == [1] and ours[f"{name}, stream"][0] > 0
    assert ours["accuracy"] == [0] and ours[f"{compare.SETS[0]}, memory"][0] > 50


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_without_another_project_nothing_is_written(tmp_path, monkeypatch):
    def install(peer, folder):
        raise compare.Stopped("no network")

    written = utils.ROOT / "README.md", RESULT, utils.RESULTS / "compare.png"
    before = [path.stat().st_mtime_ns for path in written]
    monkeypatch.setattr(compare, "install", install)
    with pytest.raises(utils.InputError, match="no other project can be measured.*fer: no network"):
        compare.main(tmp_path, 1, 1)
    assert [path.stat().st_mtime_ns for path in written] == before


def test_a_page_without_its_place_is_told():
    with pytest.raises(utils.InputError, match="0 places for comparison"):
        utils.fill_in("# A page", "comparison", "text")
