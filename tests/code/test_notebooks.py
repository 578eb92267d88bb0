"""papermill executes every notebook, with small parameters; scripts tell their parameters."""

import shutil

import cv2
import nbformat
import papermill
import pytest
from jupyter_client.manager import start_new_kernel

import utils

NOTEBOOKS = sorted((utils.ROOT / "notebooks").glob("*.ipynb"))
SCRIPTS = sorted((utils.ROOT / "scripts").glob("*.py"))


@pytest.fixture(scope="session")
def recorded_stages(tmp_path_factory):
    """A copy of what train_pretrained.py left in results/model, so that 04_transfer_learning does not train again."""
    folder = tmp_path_factory.mktemp("recorded")
    ignored = shutil.ignore_patterns("my_own_model*")
    return shutil.copytree(utils.MODEL.parent, folder, ignore=ignored, dirs_exist_ok=True)


@pytest.fixture
def small_parameters(small_fer2013, small_digits, recorded_stages, astronaut, tmp_path):
    """What makes each notebook quick, and keeps it from writing into the project."""
    data = {"data": str(small_fer2013)}
    video = {"source": str(utils.CLIP)}
    small_run = {"iteration": "plain", "epochs": 1, "batch_size": 32, "precision": "float32"}
    cv2.imwrite(str(tmp_path / "smile.png"), astronaut)
    smile = {"image": str(tmp_path / "smile.png"), "output": str(tmp_path / "hacked")}
    digits = {"data": str(small_digits), "output": str(tmp_path / "mnist")}
    return {
        "00_get_data": {"only_detector": True, "data": str(tmp_path), "detector_source": "http://127.0.0.1:9/x"},
        "01_mnist_warmup": digits | {"epochs": 1, "long_epochs": 1},
        "02_eda": data | {"epochs": 1, "output": str(tmp_path / "eda")},
        "03_cnn_iterations": data | small_run | {"run": str(tmp_path / "run"), "output": str(tmp_path / "model")},
        "04_transfer_learning": data | {"output": str(recorded_stages)},
        "05_evaluation": data | {"verbose": True},
        "06_preprocessing_test": video | {"output": str(tmp_path / "faces")},
        "07_live_stream": video | {"every": 2.0},
        "08_adversarial_hack": data | smile,
        "09_video_archive": {"output": str(tmp_path / "archive"), "every": 0.5, "workers": 2},
    }


def execute(notebook, parameters, output):
    """Execute a notebook with papermill, which only warns of a parameter that the notebook does not have."""
    unknown = parameters.keys() - papermill.inspect_notebook(notebook).keys()
    if unknown:
        raise ValueError(f"{notebook} has no parameter {', '.join(sorted(unknown))}")
    quiet = {"kernel_name": "python3", "progress_bar": False}
    papermill.execute_notebook(notebook, output, parameters, cwd=notebook.parent, execution_timeout=600, **quiet)
    return nbformat.read(output, as_version=4)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_executes_it(notebook, small_parameters, tmp_path):
    if notebook.stem == "09_video_archive":
        pytest.importorskip("distributed", reason="Dask is not there: `make archive` installs it")
    executed = execute(notebook, small_parameters[notebook.stem], tmp_path / "executed.ipynb")
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs


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
def test_every_script_has_help(script, run_script):
    process = run_script(script.name, "--help")
    assert process.returncode == 0 and "usage:" in process.stdout
    assert "default" in process.stdout or "empty for" in process.stdout


def test_the_live_stream_plays_in_one_output_and_the_stop_button_ends_it():
    """07 on a kernel of its own, as JupyterLab runs it: its last cells draw what was seen until the interrupt."""
    notebook = nbformat.read(utils.ROOT / "notebooks" / "07_live_stream.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    playing = next(i for i, cell in enumerate(cells) if "def play(" in cell.source)
    skipped = next(i for i, cell in enumerate(cells) if "main" in cell.metadata.get("tags", []))
    manager, kernel = start_new_kernel(cwd=str(utils.ROOT / "notebooks"))
    try:
        for i, cell in enumerate(cells[:playing]):
            code = "net = utils.EmotionNet(); source = utils.CLIP" if i == skipped else cell.source
            assert kernel.execute_interactive(code, timeout=120)["content"]["status"] == "ok"
        messages, updates = [], []

        def collect(message):
            messages.append(message)
            updates.extend([message] if message["msg_type"] == "update_display_data" else [])
            if len(updates) == 15:
                manager.interrupt_kernel()

        reply = kernel.execute_interactive(cells[playing].source, timeout=120, output_hook=collect)
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
        reply = kernel.execute_interactive("%matplotlib inline\n" + cells[playing + 1].source, timeout=120, **hook)
        assert reply["content"]["status"] == "ok" and any("image/png" in data for data in drawn)
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
