"""The parameters of a notebook: what it refuses, and what it takes as a script's command line would."""

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

import utils
from tests.conftest import execute_notebook

PARAMETERS = """\
times: int = 2  # how often it is said
rate: float = 1.5  # how fast
shout: bool = False  # in capital letters
text: str = ""  # what is said
names: list = []  # to whom"""
CELLS = [
    (None, f"import sys\nsys.path.append({str(utils.ROOT)!r})\nimport utils"),
    ("parameters", PARAMETERS),
    (None, "utils.check_parameters(globals())"),
    (None, "print((times, rate, shout, text, names))"),
]


@pytest.fixture
def run_notebook(tmp_path):
    """Run a small notebook with papermill as a user would, and return what it printed."""

    def run(**parameters):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        nb.cells = [nbformat.v4.new_code_cell(code, metadata={"tags": [tag] if tag else []}) for tag, code in CELLS]
        nbformat.write(nb, tmp_path / "demo.ipynb")
        executed = execute_notebook(tmp_path / "demo.ipynb", parameters, tmp_path / "out.ipynb")
        return "".join(output.text for cell in executed.cells for output in cell.outputs)

    return run


def test_a_mistyped_parameter_stops_the_notebook(run_notebook):
    with pytest.raises(PapermillExecutionError) as error:
        run_notebook(tmes=3, text="hello")
    assert error.value.ename == "InputError"
    assert error.value.evalue == "there is no parameter tmes; expected one of times, rate, shout, text, names"


def test_a_wrong_type_is_told_with_the_parameters_name(run_notebook):
    with pytest.raises(PapermillExecutionError) as error:
        run_notebook(times="few")
    assert error.value.evalue == "parameter times is 'few'; expected a whole number"


def test_papermill_gives_what_the_command_line_of_a_script_gives(run_notebook):
    """`-p source 0` is an int to papermill, and `-p image me.jpg` a text."""
    assert run_notebook(rate=3, text=0, names="me.jpg") == "(2, 3.0, False, '0', ['me.jpg'])\n"


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, 3.0, "a whole number"),
        (int, True, "a whole number"),
        (float, "3", "a number"),
        (float, False, "a number"),
        (bool, 1, "True or False"),
        (str, None, "text"),
        (str, 0.5, "text"),
        (list, 3, "a list"),
    ],
)
def test_each_type_is_told_in_words(kind, value, expected):
    with pytest.raises(utils.InputError, match=f"^parameter knob is {value!r}; expected {expected}$"):
        utils.check_parameters({"__annotations__": {"knob": kind}, "knob": value, "In": [""]})


def test_what_was_mended_is_forgotten():
    """In JupyterLab the cells of an executed copy are run again in the same kernel."""
    cells = ["", "# Parameters\ntmes = 3\n", "# Parameters\ntimes = 3\n"]
    utils.check_parameters({"__annotations__": {"times": int}, "times": 3, "In": cells})


@pytest.mark.parametrize("path", sorted((utils.ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_checks_its_parameters_first(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    place = next(i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    assert code[place + 1].source == "utils.check_parameters(globals())"
    assert not code[place + 1].metadata.get("tags"), "a script's command line checks its own"
