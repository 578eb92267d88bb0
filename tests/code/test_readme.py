"""Every command of the README is run in a copy of the project, in a short version where it is long."""

import os
import re
import socket
import subprocess

import cv2
import pytest

import utils
from tools import times

pytestmark = pytest.mark.slow

README = (utils.ROOT / "README.md").read_text()
ANSWER = r"Preprocessing \.\.\.\n\d\d:\d\d:\d\d(\.\d\d)?s : \w+( \w+)?( , \d+%)?\n"
STREAM, DETECTOR = "python scripts/predict_live_stream.py --source short.mp4", r"YuNet is already at|note: .*Haar"
NO_DOWNLOAD = "--only-detector --detector-source http://127.0.0.1:9/x"
PAPERMILL, TRAIN = "papermill --cwd notebooks", "--iteration plain --epochs 1"
TRAINED = f"python scripts/train.py {TRAIN} --output runs/model && test -s runs/model/iterations.csv"
with socket.create_server(("127.0.0.1", 0)) as free:
    ADDRESS = f"127.0.0.1:{free.getsockname()[1]}"
PAIR = f"export KERAS_BACKEND=jax KERAS_DISTRIBUTION_JOB_ADDRESSES={ADDRESS} KERAS_DISTRIBUTION_NUM_PROCESSES=2; "
PAIR += " & ".join(
    f"KERAS_DISTRIBUTION_PROCESS_ID={place} python scripts/train.py {TRAIN} --limit 700 --run runs/pair"
    for place in (1, 0)
)
BACK = f"cp -r ../emotions/runs . && {TRAINED}"

# What the README says: what is run for it, and what the output must hold.
SHORT = {
    "make live": ('make live ARGS="--source short.mp4"', ANSWER),
    'make live ARGS="--show"': ('make live ARGS="--source short.mp4 --record runs/shown.mp4"', ANSWER),  # no screen
    "make test": ('make test ARGS="tests/code/test_faces.py --collect-only -q"', r"tests collected|: \d+\n"),
    'make test ARGS="-m slow"': (
        'make test ARGS="tests/code/test_readme.py -m slow --collect-only -q"',
        r"tests collected|: \d+\n",
    ),
    "make": ("make", r"(?s)live .*test .*report "),
    "make bench": ("make --dry-run bench", r"tests/benchmark\.py --output results/benchmark\.json"),  # takes minutes
    "make times": ("make --dry-run times", r"tools/times\.py"),  # takes minutes
    "make compare": ("make --dry-run compare", r"tools/compare\.py"),  # installs 8 GB
    "make soak": ("make --dry-run soak", r"tests/soak\.py --output results/soak\.json"),  # takes minutes
    "make predict": ("make predict", r"Accuracy on test set: \d+%"),
    "make preprocess": ("make preprocess", "21 images of 48x48 pixels"),
    'make train ARGS="--output runs/mine"': (
        f'make train ARGS="{TRAIN} --run runs/again --output runs/mine"',
        "epoch 1:",
    ),
    "make data": (f'make data ARGS="{NO_DOWNLOAD}"', DETECTOR),
    "make lab": ('make lab ARGS="--version"', r"\d+\.\d+\.\d+"),
    "make report": ("make report", r"open results/report/index\.html"),
    """make archive ARGS="--videos recordings 'more/*.mp4' list.txt --output emotions\"""": (
        """make archive ARGS="--videos short.mp4 'sh*.mp4' --output runs/emotions --workers 1\"""",
        r"1 of 1 recordings",
    ),
    "make scripts": ("make scripts && test -s scripts/train.py", ""),
    "python scripts/get_data.py --only-detector": (f"python scripts/get_data.py {NO_DOWNLOAD}", DETECTOR),
    "python scripts/predict.py --image me.jpg holiday --output read": (
        "python scripts/predict.py --image me.jpg holiday --output read && test -s read/me_emotions.png",
        r"(?s)me\.jpg : Happy , \d+%\n.*holiday/us\.jpg : ",
    ),
    "source .venv/bin/activate": ("source .venv/bin/activate && python -c 'import sys; print(sys.prefix)'", r"\.venv"),
    "python scripts/predict_live_stream.py --source 0 --show": (STREAM, ANSWER),
    "predict_live_stream.py --every 0.5": (f"{STREAM} --every 0.5", ANSWER),
    f"{PAPERMILL} -p iteration plain -p output ../runs/quick notebooks/03_cnn_iterations.ipynb out.ipynb": (
        f"{PAPERMILL} -k python3 -p epochs 1 -p batch_size 32 -p precision float32 -p iteration plain "
        "-p output ../runs/quick -p run ../runs/quick_run "
        "notebooks/03_cnn_iterations.ipynb out.ipynb && test -s runs/quick/iterations.csv",
        "",
    ),
    "papermill -p every 0.5": (
        f"{PAPERMILL} -k python3 -p source ../short.mp4 -p every 0.5 notebooks/07_live_stream.ipynb out.ipynb",
        "",
    ),
    "tensorboard --logdir runs": ("tensorboard --version_tb", r"\d+\.\d+"),
    # A folder beside the project stands for the rented machine, TensorFlow for JAX. Each needs the one before.
    "ssh you@gpu mkdir -p emotions": ("mkdir -p ../emotions", ""),
    "scp -r utils.py training.py scripts data/cache/train.npz you@gpu:emotions/": (
        "cp -r utils.py training.py scripts data/cache/train.npz ../emotions/",
        "",
    ),
    "KERAS_BACKEND=jax python scripts/train.py --data . --run runs/deep": (
        f"cd ../emotions && KERAS_BACKEND=tensorflow python scripts/train.py {TRAIN} --data . --run runs/plain",
        "",
    ),
    "scp -r you@gpu:emotions/runs . && python scripts/train.py": (BACK, ""),
    **dict.fromkeys(
        [
            f"KERAS_DISTRIBUTION_PROCESS_ID={place} python scripts/train.py --iteration plain --epochs 4"
            for place in "01"
        ],
        (PAIR, "2 devices in 2 processes(?s:.*)epoch 1:"),
    ),
    "make .venv/jax": ("make --dry-run .venv/jax", "requirements-jax.txt|up to date"),
    # Windows: the same scripts, with the other kind of slash.
    r".venv\Scripts\python scripts\get_data.py --only-detector": (
        f"python scripts/get_data.py {NO_DOWNLOAD}",
        DETECTOR,
    ),
    r".venv\Scripts\python scripts\predict_live_stream.py --show": (STREAM, ANSWER),
}
NOT_RUN = {name: "`make times` runs it" for name in times.COMMANDS if " " in name} | {
    "git clone --depth 1": "the README does not name the address",
    "conda env create -f environment.yml && conda activate emotions": "downloads 3 GB",
    "pip install keras jax[cuda13] numpy opencv-python-headless": "downloads 5 GB",
    "ls /dev/video*": "a camera is needed",
    "sudo usermod -aG video $USER": "changes the machine",
    "docker run --device /dev/video0": "a part of a command",
    "py -3.12 -m venv .venv": "Windows",
    r".venv\Scripts\python -m pip install -r requirements.txt": "Windows",
}
PROGRAMS = {
    *(
        "make",
        "python",
        "python3",
        "py",
        "pip",
        "papermill",
        "conda",
        "tensorboard",
        "jupyter",
        "jupyter-lab",
        "source",
    ),
    *("git", "scp", "ssh", "cd", "ls", "sudo", "docker", "apt", "apt-get", "brew", "curl", "wget", "bash", "uv"),
}


def find_commands(text):
    """Return the commands in the code blocks and between the backticks of a README, in its order, each once.

    In a block, each line that starts with a program is a command; Python, output and lists of files are not. Between
    backticks a program alone, as in "with `python`", is none, but for `make`.
    """
    blocks = [
        block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language != "python"
    ]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
    lines += [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose)]
    commands = []
    for line in lines:
        first, *others = [word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)] or [""]
        program = first in PROGRAMS or first.startswith(".venv") or first.endswith(".py") and "-" in line
        if (program and others) or line == "make":
            commands.append(line.strip())
    return list(dict.fromkeys(commands))


COMMANDS = find_commands(README)


@pytest.fixture(scope="module")
def shell(project, astronaut):
    """Run a command in a copy of the project with pictures and a short clip, .venv activated; return the process."""
    frames = [frame for seconds, frame in utils.Video(utils.CLIP) if 9 <= seconds < 12]
    writer = cv2.VideoWriter(str(project / "short.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, (640, 480))
    for frame in frames:
        writer.write(frame)
    writer.release()
    cv2.imwrite(str(project / "me.jpg"), astronaut)
    (project / "holiday").mkdir()
    cv2.imwrite(str(project / "holiday" / "us.jpg"), frames[25])
    utils.load_fer2013("train", project / "data")  # leaves data/cache/train.npz
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("ARGS", "MAKE", "MFLAGS", "PYTEST"))
    }
    environment = inherited | {"MPLBACKEND": "agg", "PATH": f"{project}/.venv/bin:{os.environ['PATH']}"}
    finished = {}

    def run(command):
        if command not in finished:  # two commands of the README may have one short version
            line = ["bash", "-c", command]
            finished[command] = subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True)
        return finished[command]

    return run


def test_every_command_is_known():
    assert {*COMMANDS} == SHORT.keys() | NOT_RUN.keys(), "a command of the README and this test differ"


def test_commands_are_found():
    text = "`make` or\n`make\nlive` with `python`:\n\n```\nX=1 python a.py  # now\nme.jpg : Sad\n```\n"
    text += "```python\nimport git\n```\n"
    assert find_commands(text) == ["X=1 python a.py", "make", "make live"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command in SHORT])
def test_a_command_works(shell, command):
    short, output = SHORT[command]
    if "KERAS_BACKEND=jax" in short:
        pytest.importorskip("jax", reason="JAX is not there: `make .venv/jax` installs it")
    if "make archive" in short:
        pytest.importorskip("distributed", reason="Dask is not there, and would be installed: `make archive` does that")
    process = shell(short)
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(output, process.stdout + process.stderr), process.stdout + process.stderr


def test_the_python_block_works(shell, project):
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)):
        (project / f"block{number}.py").write_text(block)
        process = shell(f"python block{number}.py")
        assert process.returncode == 0 and "Happy" in process.stdout, process.stderr
