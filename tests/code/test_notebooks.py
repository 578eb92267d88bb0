"""papermill executes every notebook, with small parameters; scripts tell their parameters."""

import re
import shutil

import cv2
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

import utils
from tests.conftest import execute_notebook

NOTEBOOKS = sorted((utils.ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = [path for path in NOTEBOOKS if not path.stem.endswith("_hack")]  # which test_hack.py executes
SCRIPTS = sorted((utils.ROOT / "scripts").glob("*.py"))


@pytest.fixture(scope="session")
def recorded_stages(tmp_path_factory):
    """A copy of what train_pretrained.py left in results/model, so that 04_transfer_learning does not train again."""
    folder = tmp_path_factory.mktemp("recorded")
    ignored = shutil.ignore_patterns("my_own_model*")
    return shutil.copytree(utils.MODEL.parent, folder, ignore=ignored, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def checkout(small_fer2013, tmp_path_factory):
    """A copy of the project with the small data set, since some notebooks look into data/ and write to results/."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    shutil.copytree(
        utils.ROOT, folder, ignore=shutil.ignore_patterns(".*", "data", "runs", "tests", "report", "__pycache__")
    )
    shutil.copytree(small_fer2013, folder / "data")
    if utils.YUNET.is_file():
        shutil.copytree(utils.YUNET.parent, folder / "data" / "models")
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """The bundled clip at five frames a second, and three of its seconds, as paths."""
    folder, code = tmp_path_factory.mktemp("clips"), cv2.VideoWriter.fourcc(*"mp4v")
    sparse, short = (str(folder / name) for name in ("sparse.mp4", "short.mp4"))
    writers = cv2.VideoWriter(sparse, code, 5, (640, 480)), cv2.VideoWriter(short, code, 25, (640, 480))
    for number, (seconds, frame) in enumerate(utils.Video(utils.CLIP)):
        for writer, wanted in zip(writers, (number % 5 == 0, 9 <= seconds < 12), strict=True):
            if wanted:
                writer.write(frame)
    for writer in writers:
        writer.release()
    return {"sparse": sparse, "short": short}


@pytest.fixture
def small_parameters(small_fer2013, small_digits, recorded_stages, clips, tmp_path):
    """What makes each notebook quick, and keeps it from writing into the project."""
    data = {"data": str(small_fer2013)}
    small_run = {"iteration": "plain", "epochs": 1, "batch_size": 32, "precision": "float32"}
    digits = {"data": str(small_digits), "output": str(tmp_path / "mnist")}
    return {
        "00_get_data": {"only_detector": True, "data": str(tmp_path), "detector_source": "http://127.0.0.1:9/x"},
        "01_mnist_warmup": digits | {"epochs": 1, "long_epochs": 1},
        "02_eda": data | {"epochs": 1},
        "03_cnn_iterations": data | small_run | {"run": str(tmp_path / "run"), "output": str(tmp_path / "model")},
        "04_transfer_learning": data | {"output": str(recorded_stages)},
        "05_evaluation": data | {"verbose": True, "limit": 40},
        "06_preprocessing_test": {"source": clips["sparse"], "output": str(tmp_path / "faces")},
        "07_live_stream": {"source": clips["short"], "every": 2.0},
        "09_video_archive": {"output": str(tmp_path / "archive"), "every": 0.5, "workers": 2},
        "extra_bundled_clip": {},
    }


@pytest.fixture(scope="session")
def pages(checkout, tmp_path_factory):
    """Execute a notebook once, with papermill and small parameters; return it."""
    done = {}

    def page(stem, parameters):
        if stem not in done:
            notebook, output = checkout / "notebooks" / f"{stem}.ipynb", tmp_path_factory.mktemp(stem)
            done[stem] = execute_notebook(notebook, parameters, output / "executed.ipynb")
        return done[stem]

    return page


def read_figures(executed):
    """Return the pictures of an executed notebook, as text."""
    outputs = sum((cell.outputs for cell in executed.cells if cell.cell_type == "code"), [])
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("notebook", EXECUTED, ids=lambda path: path.stem)
def test_papermill_executes_it(notebook, checkout, small_parameters, pages):
    """Each figure has words for those who cannot see it, no cell floods the page, and the results stay as they are."""
    if notebook.stem == "09_video_archive":
        pytest.importorskip("distributed", reason="Dask is not there: `make archive` installs it")
    results = {path: path.stat().st_mtime_ns for path in (checkout / "results").rglob("*")}
    executed = pages(notebook.stem, small_parameters[notebook.stem])
    cells = [cell.outputs for cell in executed.cells if cell.cell_type == "code"]
    outputs = sum(cells, [])
    assert outputs
    for output in outputs:
        for kind in output.get("data", {}).keys() & {"image/png", "image/jpeg"}:
            assert output.metadata[kind]["alt"]
    for cell in cells:
        assert sum(output.get("text", "").count("\n") for output in cell) < 100
    assert {path: path.stat().st_mtime_ns for path in (checkout / "results").rglob("*")} == results


@pytest.mark.parametrize(("name", "folder"), [("02_eda", "output"), ("05_evaluation", "figures")])
def test_the_same_input_gives_the_same_figures(name, folder, checkout, small_parameters, pages, tmp_path):
    """A second run, which is asked for files, draws what the first one drew, and writes them."""
    parameters = small_parameters[name] | {folder: str(tmp_path / "written")}
    again = execute_notebook(checkout / "notebooks" / f"{name}.ipynb", parameters, tmp_path / "executed.ipynb")
    figures = read_figures(again)
    assert figures and figures == read_figures(pages(name, small_parameters[name]))
    assert len([*(tmp_path / "written").rglob("*.png")]) > 3 and [*(tmp_path / "written").rglob("*.json")]


def test_a_page_leads_to_the_one_before_and_the_one_after():
    pages = [path for path in NOTEBOOKS if path.name[0].isdigit()]
    for before, page, after in zip([None, *pages], pages, [*pages[1:], None], strict=False):
        last = nbformat.read(page, as_version=4).cells[-1].source
        for word, other in (("Before", before), ("Next", after)):
            assert not other or f"{word}: [{other.stem}]({other.name})" in last, f"{page.name} ends in {last!r}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_papers_and_notebooks_that_are_named_are_links(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.findall(r"(?<!\[)arXiv:\S+|doi 10\.\S+", text) == []
    stems = "|".join(path.stem for path in NOTEBOOKS)
    assert re.findall(rf"(?<![\[(/\w])(?:{stems})(?!\.ipynb)", text) == []
    for link in re.findall(r"\]\(([^):#]+)\)", text):
        assert (notebook.parent / link).exists(), link


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_executed_copy_is_of_this_notebook(notebook):
    """The sources in results/notebooks are those in notebooks/, every code cell was run, and none failed."""
    copy = utils.RESULTS / "notebooks" / notebook.name
    assert copy.is_file(), f"{notebook.name} was not executed: run `make notebooks`"
    cells = nbformat.read(copy, as_version=4).cells
    executed = [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    sources = [cell.source for cell in nbformat.read(notebook, as_version=4).cells]
    assert [cell.source for cell in executed] == sources, f"{copy} is out of date: run `make notebooks`"
    counts = [cell.execution_count for cell in executed if cell.cell_type == "code"]
    assert None not in counts, f"{copy} has cells that were not run: run `make notebooks`"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_help(script, call_script):
    process = call_script(script.name, "--help")
    assert process.returncode == 0 and "usage:" in process.stdout
    assert "default" in process.stdout or "empty for" in process.stdout


def test_the_live_stream_plays_in_one_output_and_the_stop_button_ends_it():
    """07 on a kernel of its own, as JupyterLab runs it: its last cells draw what was seen until the interrupt."""
    notebook = nbformat.read(utils.ROOT / "notebooks" / "07_live_stream.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    playing = next(i for i, cell in enumerate(cells) if "def play(" in cell.source)
    skipped = next(i for i, cell in enumerate(cells) if "main" in cell.metadata.get("tags", []))
    manager, kernel = start_new_kernel(startup_timeout=600, cwd=str(utils.ROOT / "notebooks"))
    try:
        for i, cell in enumerate(cells[:playing]):
            code = "net = utils.EmotionNet(); source = utils.CLIP" if i == skipped else cell.source
            assert kernel.execute_interactive(code)["content"]["status"] == "ok"
        messages, updates = [], []

        def collect(message):
            messages.append(message)
            updates.extend([message] if message["msg_type"] == "update_display_data" else [])
            if len(updates) == 15:
                manager.interrupt_kernel()

        reply = kernel.execute_interactive(cells[playing].source, output_hook=collect)
        assert reply["content"]["status"] == "ok", reply["content"]
        shown = [message for message in messages if message["msg_type"] == "display_data"]
        assert len(shown) == 1 and 15 <= len(updates) < 60  # a second and a half of twenty
        assert {message["msg_type"] for message in messages} <= {
            "status",
            "execute_input",
            "display_data",
            "update_display_data",
        }
        names = {message["content"]["transient"]["display_id"] for message in shown + updates}
        assert len(names) == 1 and "image/jpeg" in updates[-1]["content"]["data"]
        drawn = []
        hook = {"output_hook": lambda message: drawn.append(message["content"].get("data", {}))}
        reply = kernel.execute_interactive("%matplotlib inline\n" + cells[playing + 1].source, **hook)
        assert reply["content"]["status"] == "ok" and any("image/png" in data for data in drawn)
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
