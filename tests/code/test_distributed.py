"""Training on several devices and in several processes: `scripts/train.py` on JAX, small, with few faces."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import utils
from tests.conftest import assert_one_clear_line

pytestmark = pytest.mark.slow
needs_jax = pytest.mark.skipif(
    not importlib.util.find_spec("jax"), reason="JAX is not installed: pip install -r requirements-jax.txt"
)

# The script as it is, on a machine without TensorFlow, with a recipe of all that is random. It prints the loss of each
# of the twenty steps, five an epoch; Keras tells the mean since the epoch began.
DRIVER = f"""
import sys

sys.modules["tensorboard"] = None
sys.path[1:1] = [{str(utils.ROOT)!r}, {str(utils.ROOT / "scripts")!r}]
import train
import training
import utils


class Epochs(training.Epochs):
    def on_train_batch_end(self, batch, logs):
        print(f"loss {{float(logs['loss']):.7f}}", flush=True)


training.Epochs = Epochs
training.WAIT = 2 if "nobody" in sys.argv[-1] else 60
train.ITERATIONS["plain"] = training.Recipe(
    epochs=4, small_share=0.0, learning_rate=0.01, augmented=True, mixup=0.2, erasing=0.5, camera=0.5, average=0.9,
    adapted=0.1,
)
utils.run_script(train.main, train.parse_args)
"""
TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def cluster(place, port, count=2):
    """The environment of one of several processes on this machine."""
    values = {"JOB_ADDRESSES": f"127.0.0.1:{port}", "NUM_PROCESSES": count, "PROCESS_ID": place}
    return {f"KERAS_DISTRIBUTION_{name}": str(value) for name, value in values.items()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start(small_fer2013, tmp_path_factory):
    """Start a training in a folder of the test and return the process."""
    folder, processes = tmp_path_factory.mktemp("distributed"), []
    (folder / "driver.py").write_text(DRIVER)
    (folder / "tensorflow.py").write_text("raise ImportError")

    def start(run, environment, *arguments, batch_size=12):
        fixed = ["--iteration", "plain", "--limit", 70, "--batch-size", batch_size, "--data", small_fer2013]
        fixed += ["--precision", "float32"]  # what is fast here is measured, and may differ from run to run
        folders = ["--output", folder / "model", "--run", folder / run]
        command = [sys.executable, folder / "driver.py", *map(str, [*fixed, *arguments, *folders])]
        environment = os.environ | {"KERAS_BACKEND": "jax"} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, cwd=folder, **pipes))
        processes[-1].run = folder / run
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def finish(process):
    """Wait for a process and return it as subprocess.run would."""
    output = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def rows_of(log):
    """The rows of a log, none if it is not there yet."""
    return log.read_text().splitlines()[1:] if log.is_file() else []


def losses(printed):
    return [float(line.split()[1]) for line in printed.splitlines() if line.startswith("loss ")]


def weights(run):
    with np.load(run / "weights.npz") as arrays:
        return np.concatenate([arrays[name].ravel() for name in arrays.files])


@pytest.fixture(scope="module")
def alone(start):
    """The losses and the weights of a training in one process, with one device."""
    process = start("alone", {})
    ended = finish(process)
    assert ended.returncode == 0 and "devices" not in ended.stdout, ended.stderr
    assert len(losses(ended.stdout)) == 20
    return losses(ended.stdout), weights(process.run)


@needs_jax
def test_two_devices_train_as_one_does(start, alone):
    process = start("two_devices", TWO_DEVICES)
    ended = finish(process)
    assert ended.returncode == 0 and "2 devices in 1 process share each batch" in ended.stdout, ended.stderr
    assert losses(ended.stdout) == pytest.approx(alone[0], abs=1e-5)
    assert weights(process.run) == pytest.approx(alone[1], abs=1e-5)


@needs_jax
def test_two_processes_train_as_one_does_although_one_is_killed(start, alone):
    """The other one ends with a clear line, and both together go on from where they were to the same weights."""
    port = free_port()
    first, second = [start("pair", cluster(place, port)) for place in (0, 1)]
    log = first.run / "log.csv"
    while first.poll() is None and len(rows_of(log)) < 2:
        time.sleep(0.05)
    second.kill()
    killed = time.monotonic()
    ended = finish(first)
    assert_one_clear_line(ended, "another process has ended", "start all processes again")
    assert time.monotonic() - killed < 45  # JAX's own exit would wait for more than a minute
    done = len(rows_of(log))
    assert 2 <= done < 4

    port = free_port()
    again = [finish(process) for process in [start("pair", cluster(place, port)) for place in (0, 1)]]
    assert [process.returncode for process in again] == [0, 0], again[0].stderr + again[1].stderr
    assert not losses(again[1].stdout)  # the first one speaks for all
    assert losses(ended.stdout)[: 5 * done] + losses(again[0].stdout) == pytest.approx(alone[0], abs=1e-5)
    assert weights(first.run) == pytest.approx(alone[1], abs=1e-5)


@needs_jax
def test_processes_that_were_started_with_different_arguments_end(start):
    port = free_port()
    processes = [start("different", cluster(place, port), "--seed", place) for place in (0, 1)]
    for process in processes:
        assert_one_clear_line(finish(process), "differ in their arguments")


@needs_jax
def test_a_port_that_is_taken_is_one_clear_line(start):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_clear_line(finish(start("taken", cluster(0, port))), f":{port} cannot be used")


@needs_jax
def test_another_server_at_the_address_is_one_clear_line(start):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert_one_clear_line(finish(start("nobody", cluster(1, server.server_port))), "did not answer for 2 s")
        server.shutdown()


@needs_jax
def test_a_process_without_data_ends_before_it_joins(start, tmp_path):
    assert_one_clear_line(finish(start("no_data", cluster(1, 1), "--data", tmp_path)), "no train set in")


@needs_jax
@pytest.mark.parametrize(
    "environment, run, batch_size, words",
    [
        (TWO_DEVICES, "odd", 15, "batch_size is 15, and 2 devices"),
        (cluster(2, 1), "place", 12, "'2', '2'; expected"),
        (cluster(1, 1), "nobody", 12, "127.0.0.1:1, did not answer"),
        (cluster(0, free_port()), "nobody", 12, "1 of 2 processes joined within 2 s"),
    ],
)
def test_what_cannot_be_shared_is_one_clear_line(start, environment, run, batch_size, words):
    process = start(run, environment, batch_size=batch_size)
    assert_one_clear_line(finish(process), words)
    assert not process.run.exists()


def test_another_backend_does_not_train_alone_in_silence(call_script, small_fer2013, tmp_path, monkeypatch):
    for name, value in cluster(0, 1).items():
        monkeypatch.setenv(name, value)
    ended = call_script("train.py", "--data", small_fer2013, "--run", tmp_path / "run", "--output", tmp_path)
    assert_one_clear_line(ended, "KERAS_BACKEND=jax")
    assert not (tmp_path / "run").exists()
