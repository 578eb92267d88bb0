# Generated from notebooks/09_video_archive.ipynb by `make scripts`: edit the notebook, not this file.
"""Turns folders of recordings into one Parquet data set: a row for every answer of the live stream, with the face and
its seven probabilities.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def tell_in_one_line(kind, error, trace):
    """Tell what ends the imports as utils.run_script tells what ends the rest: Ctrl-C, or a Keras that cannot start."""
    if kind.__name__ not in ("KeyboardInterrupt", "InputError"):
        sys.__excepthook__(kind, error, trace)
    else:
        print("interrupted" if kind is KeyboardInterrupt else f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = tell_in_one_line

import glob
import hashlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import resource_tracker

import archive
import utils

SUFFIXES = ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
BINS = "$recycle.bin", "recycler", "#recycle", "@recycle", "@eadir"  # what disks and servers keep of deleted recordings


def read_list(path):
    """Return the lines of a text file, but for empty ones; a relative path begins at the file's folder."""
    if not Path(path).is_file():
        raise utils.InputError(f"no list at {utils.show_path(path)}: expected a text file")
    content = Path(path).read_bytes()
    is_wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # as PowerShell writes it
    text = content.decode("utf-16", "replace") if is_wide else content.decode("utf-8-sig", "surrogateescape")
    lines = text.replace("\0", "\n").splitlines()
    return [os.path.join(Path(path).parent, os.path.expanduser(line.strip())) for line in lines if line.strip()]


def videos_in(folder):
    """Return the sorted paths of the recordings in a folder and in those below, but for hidden and deleted ones.

    Links to other folders are followed, after what is there itself, but none that leads up and so out of the folder.
    """
    found, seen, top = [], set(), os.path.join(os.path.realpath(folder), "")
    for place, folders, files in os.walk(folder, followlinks=True):
        is_new = os.path.realpath(place) not in seen  # else a link leads back
        seen.add(os.path.realpath(place))
        targets = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
        folders[:] = sorted(
            (
                name
                for name, target in targets.items()
                if is_new
                and name[0] != "."
                and name.lower() not in BINS
                and not top.startswith(os.path.join(target, ""))
            ),
            key=lambda name: (os.path.islink(os.path.join(place, name)), name),
        )
        found += [Path(place, name) for name in files if is_new and name[0] != "."]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def find_videos(texts):
    """Return the absolute paths of what files, folders, patterns and lists stand for, each file once.

    Raises:
        utils.InputError: not one of them is a file.
    """
    found = {}
    for name in [line for text in texts if text for line in (read_list(text) if text.endswith(".txt") else [text])]:
        name = os.path.expanduser(name)
        for match in [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True)) or [name]:
            for path in videos_in(match) or [match]:  # what is no video is told as a failure
                found.setdefault(os.path.realpath(path), Path(os.path.abspath(path)))
    if not any(path.is_file() for path in found.values()):
        shown = ", ".join(utils.show_path(text) for text in texts[:3])
        raise utils.InputError(f"no video at {shown}: expected files, folders with {' '.join(SUFFIXES)}, or patterns")
    return list(found.values())


def run_child(request, root):
    """Do a request of `archive.annotate` in a child process of a Dask worker, which need not know this project.

    Returns:
        dict: what the child answers, with what it had to say on stderr as `said`; or `error`.
    """
    from distributed import get_worker

    tasks, key = get_worker().state.tasks, get_worker().get_current_task()
    command = [sys.executable, os.path.join(root, "archive.py"), json.dumps(request)]
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as errors:
        streams = {"stdin": subprocess.PIPE, "stdout": answer, "stderr": errors}
        with subprocess.Popen(command, start_new_session=True, **streams) as child:  # Ctrl-C is not for it
            try:
                while child.poll() is None and key in tasks and tasks[key].state != "cancelled":
                    time.sleep(0.05)
            finally:
                child.kill()
        answer.seek(0)
        errors.seek(0)
        said = errors.read().strip()
        if child.returncode == 0:
            return json.loads(answer.read()) | {"said": said}
    if child.returncode < 0:
        return {"error": f"its process was ended by {signal.Signals(-child.returncode).name}"}
    return {"error": f"its process failed: {said.splitlines()[-1] if said else child.returncode}"}


WAIT = 10  # seconds for a scheduler, and for its first worker


def hash_files(paths):
    """Return the SHA-256 of each file in hexadecimal, None for one that is not there."""
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None for path in paths]


def check_cluster(client, files):
    """Refuse a cluster whose workers have other versions of the packages, or of the files, than this process.

    Raises:
        utils.InputError: names the worker, and what it has.
    """
    packages = ["numpy", "pyarrow", "opencv-python", "opencv-python-headless"]
    versions = client.get_versions(packages=packages)

    def known(side):
        found = side["packages"]
        found["opencv-python"] = found["opencv-python"] or found["opencv-python-headless"]
        found["python"] = ".".join(found["python"].split(".")[:2])
        return {name: found[name] for name in ("python", "distributed", *packages[:3])}

    here = known(versions["client"])
    for address, worker in versions["workers"].items():
        for name, there in known(worker).items():
            if there != here[name]:
                raise utils.InputError(f"worker {address} has {name} {there}; expected {here[name]}, as here")
    for address, hashes in client.run(hash_files, files).items():  # as it is here: a worker cannot import it
        for file, here, there in zip(files, hash_files(files), hashes, strict=True):
            if here != there:
                found = "another file" if there else "no file"
                raise utils.InputError(f"worker {address} has {found} at {file}; expected this one, on a shared disk")


@contextmanager
def ctrl_c_later():
    """Put Ctrl-C off to the end of the block. Threads and processes that it starts never get it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else the first process that multiprocessing starts would let it through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def open_cluster(workers, scheduler, files):
    """Yield a Dask client of the cluster at `scheduler`, or of one of this machine that ends with the block.

    Raises:
        utils.InputError: nobody answers, there is no worker, or `check_cluster` refuses them.
    """
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # the answers say what failed
    local = None
    if not scheduler:
        quiet = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
        with ctrl_c_later():
            local = LocalCluster(n_workers=workers or None, threads_per_worker=1, memory_limit=None, **quiet)
    try:
        try:
            client = Client(local or scheduler, timeout=WAIT)
        except (OSError, ValueError):
            advice = "start one with `dask scheduler`, or leave --scheduler out"
            raise utils.InputError(f"no Dask scheduler at {scheduler} (waited {WAIT} s): {advice}") from None
        with client:
            try:
                client.wait_for_workers(1, timeout=WAIT)
            except TimeoutError:
                raise utils.InputError(
                    f"{scheduler} has no workers: start some with `dask worker {scheduler}`"
                ) from None
            if scheduler:
                check_cluster(client, files)
            yield client
    finally:
        if local:
            local.close()


def do_requests(client, requests, root):
    """Give requests to the workers, a bounded number at a time, and yield each with its answer as it comes.

    Args:
        client: of Dask.
        requests: deque; the caller may add to it, and take from it.
        root: this project's folder.
    """
    from distributed import as_completed

    running, completed = {}, as_completed()
    while requests or running:
        while requests and len(running) < 2 * max(1, sum(client.nthreads().values())):
            request = requests.popleft()
            future = client.submit(run_child, request, root, pure=False)
            running[future.key] = request
            completed.add(future)
        future = next(completed)
        if future.status not in ("finished", "error"):
            raise utils.InputError("the Dask scheduler is gone; what is done is kept: the same command goes on")
        error = future.exception()
        yield running.pop(future.key), {"error": f"its worker failed: {error}"} if error else future.result()


BAR = "{percentage:3.0f}%|{bar}| {n_fmt} of about {total_fmt} h of video [{elapsed}<{remaining}{postfix}]"


def complete(data_set, workers, scheduler, files):
    """Do what is to be done of an archive.DataSet, on a cluster as `open_cluster` opens it, and show how far it is.

    Raises:
        utils.InputError: there is no such cluster, or the output cannot be written; what is done is kept.
    """
    done = sum(data_set.lengths.values()) / 3600  # hours of video
    with open_cluster(workers, scheduler, files) as client:
        began, initial = time.monotonic(), done
        total = (data_set.seconds() or 0) / 3600 or None
        with utils.progress(total=total, initial=done, bar_format=BAR, unit_scale=True) as bar:
            for request, answer in do_requests(client, data_set.requests, str(utils.ROOT)):
                done += data_set.take(request, answer) / 3600
                if answer.get("said"):
                    bar.write(answer["said"], file=sys.stderr)
                bar.total = max(done, (data_set.seconds() or 0) / 3600) or None
                hours = (time.monotonic() - began) / 3600
                bar.set_postfix_str(f"{(done - initial) / hours:.1f} h of video an hour", refresh=False)
                bar.update(done - bar.n)


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--videos",
        nargs="+",
        action="extend",
        default=[],
        help="files, folders, patterns, or a .txt with one of these a line; empty for the bundled clip",
    )
    parser.add_argument("--output", type=str, default="", help="folder of the data set; empty for runs/archive")
    parser.add_argument(
        "--every", type=float, default=1.0, help="seconds of video from one answer to the next (default: %(default)s)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=10.0,
        help="frames a second that are searched for faces and classified; 0 for every frame (default: %(default)s)",
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        default=0.5,
        help="time constant in seconds of the average over a face's frames; 0 for single frames (default: %(default)s)",
    )
    parser.add_argument(
        "--segment",
        type=float,
        default=10.0,
        help="minutes; of a longer video such segments are read side by side; 0 for no segments (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes on this machine; 0 for one a core (default: %(default)s)"
    )
    parser.add_argument(
        "--scheduler",
        type=str,
        default="",
        help="address of a Dask cluster, such as tcp://host:8786; empty for this machine alone",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=4.0,
        help="GB of memory that the reading of one video may take (default: %(default)s)",
    )
    parser.add_argument(
        "--model", type=str, default="", help="a .tflite model; empty for results/model/my_own_model.tflite"
    )
    return parser.parse_args(argv)


def main(
    videos: list,
    output: str,
    every: float,
    rate: float,
    smoothing: float,
    segment: float,
    workers: int,
    scheduler: str,
    memory: float,
    model: str,
):
    least = {"every": 1e-3, "rate": 0, "smoothing": 0, "segment": 0, "workers": 0, "memory": 1}
    for name, value in zip(least, (every, rate, smoothing, segment, workers, memory), strict=True):
        if not least[name] <= value < float("inf"):
            raise utils.InputError(f"--{name} is {value}; expected {least[name]:g} or more")
    lacking = [name for name in ("distributed", "pyarrow") if importlib.util.find_spec(name) is None]
    if lacking:
        raise utils.InputError(f"{' and '.join(lacking)} missing: `make archive` installs requirements-archive.txt")
    paths = find_videos(list(map(str, videos)) or [str(utils.CLIP)])
    folder = utils.output_folder(output, utils.RUNS / "archive").absolute()
    model = os.path.abspath(model or utils.MODEL.with_suffix(".tflite"))
    utils.EmotionNet(model)  # refuses what is no model
    utils.tell_of_haar()
    options = {
        "every": every,
        "rate": max(rate, 1 / every) if rate else 0.0,
        "smoothing": smoothing,
        "segment": segment,
    }
    options["models"] = hash_files([model, utils.YUNET])
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    with utils.locked(folder):
        data_set = archive.DataSet(folder, paths, options, {"model": model, "memory": memory})
        try:
            if data_set.requests:
                files = [utils.ROOT / "utils.py", utils.ROOT / "archive.py", model, utils.YUNET]
                complete(data_set, workers, scheduler, list(map(str, files)))
        except KeyboardInterrupt:
            print("what is done is kept; the same command goes on", file=sys.stderr)
            raise
    failures = [path for path in map(str, paths) if path in data_set.failures]
    hours, shown = sum(data_set.lengths.values()) / 3600, utils.show_path(folder / "answers")
    print(f"{len(data_set.lengths)} of {len(paths)} recordings, {hours:.2f} h, are in {shown}")

    if failures:
        listing = utils.show_path(folder / "failures.csv")
        raise utils.InputError(
            f"{len(failures)} of {len(paths)} recordings failed or break off, {listing} says why; the rest is done"
        )


if __name__ == "__main__":
    utils.run_script(main, parse_args)
