"""JupyterLab opens notebooks in a browser, as a person does: Run All, look at the figures, press the stop button.

extra_robust_hack, which needs smiles, is left to papermill in test_hack.py.
"""

import os
import subprocess
import sys
import time

import cv2
import nbformat
import papermill
import pytest

import utils
from tests.conftest import read_json

pytestmark = pytest.mark.slow

PARAMETERS = {
    "00_get_data": {"only_detector": True, "detector_source": "http://127.0.0.1:9/x"},
    "01_mnist_warmup": {"epochs": 1, "long_epochs": 1},
    "02_eda": {"epochs": 1},
    "03_cnn_iterations": {},
    "04_transfer_learning": {},
    "05_evaluation": {"verbose": True},
    "06_preprocessing_test": {"source": "../sparse.mp4"},
    "07_live_stream": {"source": "../slow.mp4", "every": 2.0},
    "08_adversarial_hack": {"image": "../smile.png", "output": "../runs/hacked"},
    "09_video_archive": {"every": 0.5, "workers": 2},
    "extra_bundled_clip": {},
}
READ_CELLS = """() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].map(cell => ({
    prompt: cell.querySelector('.jp-InputPrompt')?.textContent ?? '',
    figures: [...cell.querySelectorAll('.jp-OutputArea-output img')].map(image => image.complete && image.naturalWidth),
    picture: cell.querySelector('.jp-OutputArea-output img')?.src ?? '',
    text: [...cell.querySelectorAll('.jp-OutputArea-output')].map(box => box.textContent).join('\\n'),
}))"""


@pytest.fixture(scope="module")
def lab(project, astronaut, tmp_path_factory):
    """The address of a JupyterLab in a copy of the project, with a token; it has settings and places of its own."""
    frames = [frame for _, frame in utils.Video(utils.CLIP)]
    for name, step, fps in (("sparse", 5, 5), ("slow", 4, 2)):  # the second one lasts a minute, and has 120 frames
        writer = cv2.VideoWriter(str(project / f"{name}.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), fps, (640, 480))
        for frame in frames[::step]:
            writer.write(frame)
        writer.release()
    cv2.imwrite(str(project / "smile.png"), astronaut)
    own = tmp_path_factory.mktemp("jupyter")
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    places += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = os.environ | {place: str(own / place) for place in places}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.root_dir=."]
    command += ["--LabApp.extension_manager=readonly"]  # does not ask PyPI
    command += ["--MappingKernelManager.cull_idle_timeout=30", "--MappingKernelManager.cull_interval=10"]
    with open(own / "log.txt", "w") as log:
        server = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log)
    try:
        told = None
        while not told:
            assert server.poll() is None, (own / "log.txt").read_text()
            time.sleep(0.1)
            told = next(map(read_json, (own / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json")), None)
        yield f"{told['url']}lab/workspaces/{{0}}/tree/tried/{{0}}.ipynb?token={told['token']}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def run_all(lab, project, browser):
    """Open a notebook with small parameters and choose Run All; return the page and what its console complains of."""
    pages = []

    def run(name, last_cell="None"):
        notebook = papermill.iorw.load_notebook_node(str(project / "notebooks" / f"{name}.ipynb"))
        notebook = papermill.parameterize.parameterize_notebook(notebook, PARAMETERS[name])
        notebook.cells.append(nbformat.v4.new_code_cell(last_cell))
        (project / "tried").mkdir(exist_ok=True)
        nbformat.write(notebook, project / "tried" / f"{name}.ipynb")
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        pages.append(page)
        page.set_default_timeout(0)  # pytest-timeout ends what hangs
        complaints = []
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(lab.format(name))
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        return notebook, page, complaints

    yield run
    for page in pages:
        page.close()


def wait_for_the_end(page, notebook):
    """Return the cells of a page when some have run, to which JupyterLab gives numbers, and none is waiting.

    JupyterLab lays out the cells of a long notebook while the first ones run already, so all have to be there. A figure
    that the browser still decodes has the width False.
    """
    while True:
        cells = page.evaluate(READ_CELLS)
        prompts = "".join(cell["prompt"] for cell in cells)
        has_ended = any(sign.isdigit() for sign in prompts) and "*" not in prompts
        is_decoding = any(width is False for cell in cells for width in cell["figures"])
        if len(cells) == len(notebook.cells) and has_ended and not is_decoding:
            return cells
        page.wait_for_timeout(200)


def assert_that_all_went_well(name, notebook, cells, complaints):
    """Assert that no cell failed, and that those with figures in the executed copy have some here, each with a size."""
    assert [cell["text"] for cell in cells if "Traceback" in cell["text"]] == []
    assert cells[-1]["prompt"] != "[ ]:"
    executed = nbformat.read(utils.RESULTS / "notebooks" / f"{name}.ipynb", as_version=4)
    drawing = {
        cell.id
        for cell in executed.cells
        if any({"image/png", "image/jpeg"} & {*output.get("data", {})} for output in cell.get("outputs", []))
    }
    expected = [i for i, cell in enumerate(notebook.cells) if cell.id in drawing]
    assert expected
    for i in expected:
        assert cells[i]["figures"], notebook.cells[i].source
    assert all(width > 100 for cell in cells for width in cell["figures"])
    assert complaints == []


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - {"07_live_stream"}))
def test_run_all_draws_every_figure(run_all, name):
    notebook, page, complaints = run_all(name)
    assert_that_all_went_well(name, notebook, wait_for_the_end(page, notebook), complaints)


def test_the_live_picture_changes_in_place_until_the_stop_button(run_all):
    """The clip lasts a minute, and is stopped after a few of its pictures; the cells after it are run all the same."""
    notebook, page, complaints = run_all("07_live_stream", last_cell="print('seen until', seen[-1][0])")
    playing = next(i for i, cell in enumerate(notebook.cells) if "def play(" in cell.source)
    pictures = set()
    while len(pictures) < 4:
        for cell in page.evaluate(READ_CELLS)[playing : playing + 1]:  # it may not be laid out yet
            assert len(cell["figures"]) <= 1
            pictures |= {cell["picture"]} - {""}
        page.wait_for_timeout(100)
    page.locator('[data-command="notebook:interrupt-kernel"]').first.click()
    cells = wait_for_the_end(page, notebook)
    assert_that_all_went_well("07_live_stream", notebook, cells, complaints)
    assert len(cells[playing]["figures"]) == 1
    assert float(cells[-1]["text"].split()[-1]) < 50
