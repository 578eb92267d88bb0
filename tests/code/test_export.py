"""The export of notebooks to scripts: what an author, or somebody who runs a script, relies on."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbconvert.nbconvertapp import NbConvertApp

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "tools" / "nbconvert_config.py"

INTRO = "# A title\n\nSay a number of times what was said."
IMPORTS = ("export", "import sys\nfrom pathlib import Path\n\nimport utils")
PARAMETERS = (
    "parameters",
    """\
times: int = 2  # how often it is said
learning_rate: float = 1e-3  # 100% of it at first
shout: bool = True  # in capital letters
text: str = ""  # what is said instead""",
)
GREET = ("export", "def greet(text, shout):\n    return text.upper() if shout else text")
MAIN = ("main", 'for i in range(times):\n    print(greet(text or "hello", shout), i, learning_rate)')
LAST = ("main", "print(Path(sys.argv[0]).suffix and utils.SIDE)")
DEMO = [IMPORTS, PARAMETERS, (None, "print('only in the notebook')"), GREET, MAIN, LAST]


def write_notebook(path, cells, intro=INTRO, export="demo.py"):
    """Write a notebook of one markdown cell and (tag, code) cells, and return its path."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel} | ({"export": export} if export else {}))
    nb.cells = [nbformat.v4.new_markdown_cell(intro)]
    nb.cells += [nbformat.v4.new_code_cell(code, metadata={"tags": [tag] if tag else []}) for tag, code in cells]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)
    return path


def export(output, *notebooks, config=CONFIG):
    """Export notebooks, or all of the project's, as `make scripts` does, and return the scripts by name."""
    app = NbConvertApp()
    app.initialize(["--config", str(config), "--output-dir", str(output), *map(str, notebooks)])
    if app.notebooks:  # without any, nbconvert prints its help and exits
        app.start()
    return read_files(output)


def read_files(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*") if path.is_file()}


def run(*command, cwd=ROOT, **options):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, **options)


@pytest.fixture
def export_cells(tmp_path):
    """A function that exports a notebook of some cells and returns the script."""

    def export_cells(*cells, **options):
        return export(tmp_path / "scripts", write_notebook(tmp_path / "demo.ipynb", cells, **options))["demo.py"]

    return export_cells


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project folder with utils.py, notebooks/demo.ipynb and scripts/demo.py."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "utils.py", folder)
    export(folder / "scripts", write_notebook(folder / "notebooks" / "demo.ipynb", DEMO))
    return folder


def test_scripts_are_in_sync_with_the_notebooks(tmp_path):
    exported, committed = export(tmp_path), read_files(ROOT / "scripts")
    problems = [f"{name} is missing" for name in sorted(exported.keys() - committed.keys())]
    problems += [f"{name} comes from no notebook" for name in sorted(committed.keys() - exported.keys())]
    both = sorted(exported.keys() & committed.keys())
    problems += [f"{name} differs from its notebook" for name in both if exported[name] != committed[name]]
    assert not problems, f"scripts/: {', '.join(problems)}; run `make scripts`"


def test_no_two_notebooks_export_the_same_script():
    names = [nbformat.read(path, as_version=4).metadata.get("export") for path in ROOT.glob("notebooks/*.ipynb")]
    names = [name for name in names if name]
    assert sorted(set(names)) == sorted(names)


def test_only_notebooks_that_name_a_script_are_exported(tmp_path):
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    write_notebook(tmp_path / "notebooks" / "00_warmup.ipynb", DEMO, export=None)
    write_notebook(tmp_path / "notebooks" / "01_train.ipynb", DEMO, export="train.py")
    assert export(tmp_path / "out", config=tmp_path / "tools" / CONFIG.name).keys() == {"train.py"}


def test_script_runs_from_any_folder(project, tmp_path):
    result = run(project / "scripts" / "demo.py", "--times", "1", "--no-shout", "--text", "bye", cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("bye 0 0.001\n48\n", "")


def test_papermill_and_the_script_turn_the_same_knob(project, tmp_path):
    notebook, parameters = project / "notebooks" / "demo.ipynb", {"times": 3}
    assert parameters.keys() <= papermill.inspect_notebook(notebook).keys()
    options = {"cwd": project, "kernel_name": "python3", "progress_bar": False, "start_timeout": 600}
    executed = papermill.execute_notebook(notebook, tmp_path / "out.ipynb", parameters, **options)
    printed = [output.text for cell in executed.cells for output in cell.get("outputs", [])]
    assert "HELLO 2 0.001\n" in printed[1]
    assert "".join(printed[1:]) == run(project / "scripts" / "demo.py", "--times", "3").stdout


def test_help_explains_every_flag(project):
    text = " ".join(run(project / "scripts" / "demo.py", "--help").stdout.split())
    assert "Say a number of times what was said." in text
    assert "--times TIMES how often it is said (default: 2)" in text
    assert "--learning-rate LEARNING_RATE 100% of it at first (default: 0.001)" in text
    assert "--shout, --no-shout in capital letters (default: True)" in text
    assert text.endswith("--text TEXT what is said instead")


def test_flags_have_types(project):
    result = run(project / "scripts" / "demo.py", "--times", "few")
    assert "--times: invalid int value: 'few'" in result.stderr


def test_a_list_takes_several_values(export_cells, tmp_path):
    shutil.copy(ROOT / "utils.py", tmp_path)
    export_cells(IMPORTS, ("parameters", "names: list = []  # who is greeted"), ("main", "print(names)"))
    for arguments, names in ([], []), (["--names", "a b", "c", "--names", "d"], ["a b", "c", "d"]):
        assert run(tmp_path / "scripts" / "demo.py", *arguments).stdout == f"{names}\n"


def test_a_parameter_of_the_notebooks_own_looks_is_no_flag(export_cells, tmp_path):
    shutil.copy(ROOT / "utils.py", tmp_path)
    parameters = ("parameters", 'times: int = 2  # how often\ncolour: str = "red"  # of the plot')
    script = export_cells(IMPORTS, parameters, ("main", "print(times)"), (None, "plot(colour)"))
    assert "colour" not in script and "def main(times: int):" in script
    assert run(tmp_path / "scripts" / "demo.py", "--times", "3").stdout == "3\n"


def test_script_passes_ruff(project):
    script = (project / "scripts" / "demo.py").read_text()
    for command in ["check"], ["format", "--check"]:
        result = run("-m", "ruff", *command, "--stdin-filename", ROOT / "scripts" / "demo.py", "-", input=script)
        assert result.returncode == 0, result.stdout


def test_script_names_its_notebook_and_keeps_only_tagged_cells(project):
    script = (project / "scripts" / "demo.py").read_text()
    assert script.startswith("# Generated from notebooks/demo.ipynb by `make scripts`")
    assert "only in the notebook" not in script
    assert script.index("def greet") < script.index("def main") < script.index("range(times)") < script.index("SIDE")
    assert script.count("import sys\n") == script.count("from pathlib import Path\n") == 1


def test_exporting_twice_changes_nothing(project, tmp_path):
    assert export(tmp_path, project / "notebooks" / "demo.ipynb") == read_files(project / "scripts")


def test_notebook_without_parameters_exports_a_script_without_flags(export_cells):
    assert "def main():" in export_cells(IMPORTS, ("main", "print(utils.ROOT)"))


def test_main_cells_keep_their_meaning(export_cells):
    cells = [
        "table = '''\none\n  two\n\tthree\n'''\nif table:\n    report = f\"\"\"\n{table}\n    done\"\"\"",
        "words = ['# \\\n no comment', table,\n'x']\n\ndef twice(x):\n    y = '''\n'''\n\n    return [x, y]",
        "print(report, [twice(word) for word in words])",
    ]
    script = ast.parse(export_cells(IMPORTS, *(("main", cell) for cell in cells)))
    main = next(node for node in script.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert ast.unparse(main.body) == ast.unparse(ast.parse("\n".join(cells)).body)


def test_docstring_is_the_first_paragraph_and_nothing_else(export_cells):
    intro = '# A title\n\nThe path C:\\new holds\na """quoted "word"\n\nMore.\n\n## Next'
    docstring = ast.get_docstring(ast.parse(export_cells(IMPORTS, MAIN, intro=intro)))
    assert docstring.rstrip() == 'The path C:\\new holds a """quoted "word"'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("epochs: int = 3  # the default (=3)", "second `=`"),
        ('colour: str = "#fff"  # of the box', "without a `#`"),
        ('name: str = (\n    "a" "b"\n)  # on three lines', "on one line"),
        ("epochs = 3  # without a type", "expected `name: type = literal  # help`"),
        ("print(times)", "expected `name: type = literal  # help`"),
        ("epochs: int = 3 * times  # derived", "derive values in a `main` cell"),
        ("sizes: dict = {}  # of another type", "a bool, int, float or str"),
        ("sizes: list = [48]  # to which a flag would add", "or list = []"),
        ("epochs: float = 3  # of two types", "a literal of that type"),
        ("epochs: int = 3", "expected a comment"),
    ],
)
def test_parameter_that_would_be_skipped_is_refused(export_cells, line, reason):
    with pytest.raises(SystemExit) as error:
        export_cells(IMPORTS, ("parameters", f"times: int = 2  # how often\n{line}"), MAIN)
    message = str(error.value)
    assert message.startswith(f"notebooks/demo.ipynb: `parameters` cell, line 2, `{line.splitlines()[0]}`: ")
    assert reason in message


@pytest.mark.parametrize("tag", ["export", "main"])
@pytest.mark.parametrize("line", ["%matplotlib inline", "!ls", "files = !ls", "get_ipython().system('ls')", "return"])
def test_cell_that_only_a_notebook_runs_is_refused(export_cells, tag, line):
    with pytest.raises(SystemExit) as error:
        export_cells(IMPORTS, MAIN, (tag, f"x = 1\n{line}"))
    assert f"notebooks/demo.ipynb: `{tag}` cell, line 2, `{line}`: " in str(error.value)
    assert "untagged cell" in str(error.value)


@pytest.mark.parametrize(
    ("cells", "options", "reason"),
    [
        (DEMO, {"export": None}, '"export": "train.py"'),
        (DEMO, {"intro": "# Only a title"}, "a paragraph for the script's docstring"),
        ([IMPORTS, PARAMETERS, PARAMETERS, MAIN], {}, "one `parameters` cell"),
        ([IMPORTS, GREET], {}, "expected a `main` cell"),
        ([GREET, MAIN], {}, "expected `import utils`"),
    ],
)
def test_incomplete_notebook_is_refused(export_cells, cells, options, reason):
    with pytest.raises(SystemExit, match=reason):
        export_cells(*cells, **options)


def test_refusal_is_one_line_for_the_author(tmp_path):
    notebook = write_notebook(tmp_path / "bad.ipynb", [IMPORTS, ("main", "%time")])
    result = run("-m", "nbconvert", "--config", CONFIG, "--output-dir", tmp_path, "--log-level=WARN", notebook)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("notebooks/bad.ipynb: ")


def test_nbstripout_keeps_the_name_of_the_script_and_the_tags(tmp_path):
    notebook = write_notebook(tmp_path / "demo.ipynb", DEMO)
    run("-m", "nbstripout", "--keep-id", notebook, check=True)
    assert "demo.py" in export(tmp_path / "scripts", notebook)


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_cell_script_or_notebook_grows_too_long_to_read(notebook):
    """The laws of the README: 80 lines an exported cell, 400 a script, 700 lines of code a notebook."""
    nb = nbformat.read(notebook, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert sum(len(cell.source.splitlines()) for cell in code) <= 700
    assert max(len(cell.source.splitlines()) for cell in code if cell.metadata.get("tags")) <= 80
    if "export" in nb.metadata:
        assert len((ROOT / "scripts" / nb.metadata.export).read_text().splitlines()) <= 400


def test_notebooks_depend_downwards_only():
    """03 names nothing of 04, and no code of 05 and later saves a model."""
    for path in sorted((ROOT / "notebooks").glob("0[356789]*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        code = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
        if path.stem.startswith("03"):
            assert "pre_trained" not in code.lower() and "train_pretrained" not in code
        else:
            assert "save_model" not in code and "import train" not in code, path.stem
