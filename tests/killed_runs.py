"""Trains a small network in folders below the one of the command line, killed at every write of an epoch.

whole/ is a run that nobody kills. In 1-1/, 1-2/, ... are runs that were killed at the first, second, ... write of the
first epoch, in 2-1/, ... of the second, and started again. A process that is to be killed is forked from the one that
trains, when an epoch is saved: so TensorFlow starts
once, and an epoch is trained once for all of its writes.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow

import training
from tests.code.test_training import small_network

RECIPE = training.Recipe(epochs=2, small_share=0.0, average=0.9, adapted=0.25, learning_rate=0.05)
FOLDER = Path(sys.argv[1])


def in_child(work):
    """Do some work in a forked process, and return how that ended: 0, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(number, folder):
    """Let this process kill itself right before its write of that number below `folder`."""
    writes = 0

    def look(event, arguments):
        nonlocal writes
        is_write = event in ("os.rename", "os.remove", "os.rmdir") or (
            event == "os.mkdir" and not os.path.exists(arguments[0])
        )
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            is_write = arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_write and str(folder) in os.path.abspath(arguments[0]):
            writes += 1
            if writes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def train(run):
    faces = np.random.default_rng(0).integers(0, 256, (20, 48, 48)).astype(np.uint8), np.arange(20) % 7
    run.mkdir(exist_ok=True)
    training.train(run, small_network(), RECIPE, faces, faces, 10, seed=3, patience=9)


def save_and_be_killed(state, *arguments):
    """Save a state, and leave beside the run a copy for every write at which a process that saved it was killed."""
    before, epoch, number, ended = FOLDER / "before", len(state.log), 0, -signal.SIGKILL
    shutil.copytree(state.run, before)

    def attempt():
        die_at(number, state.run)
        save(state, *arguments)

    while ended == -signal.SIGKILL:
        number += 1
        ended = in_child(attempt)
        if ended == -signal.SIGKILL:
            for left in state.run.glob(".part-*"):
                os.utime(left, (0, 0))  # what is younger than a second is let alone
            shutil.copytree(state.run, FOLDER / f"{epoch}-{number}")
        shutil.rmtree(state.run)
        shutil.copytree(before, state.run)
    shutil.rmtree(before)
    if ended:
        sys.exit("a process that nobody killed failed")
    save(state, *arguments)


tensorflow.config.run_functions_eagerly(True)  # so few faces take less time than the making of a graph
save, training.State.save = training.State.save, save_and_be_killed
train(FOLDER / "whole")
training.State.save = save
for run in FOLDER.glob("*-*"):
    print(run.name, flush=True)
    train(run)
