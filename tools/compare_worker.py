"""Read frames with one project and tell how long it took: what tools/compare.py starts in each project's environment.

python tools/compare_worker.py PROJECT FOLDER imports the project and reads first.npy of the folder. Then it reads what
each line of stdin names, and prints a line of JSON for each. NumPy is all that it needs beside the project.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

LABELS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # FER2013's 0 to 6, as the others say


def open_ours(utils):
    """Return three functions. The first two take (n, h, w, 3) uint8 frames, as a stream of which ten a second are
    analysed, and as single pictures; they return how many faces are in each. The third returns a (48, 48) uint8 face's
    label.
    """
    detector, net = utils.FaceDetector(), utils.EmotionNet()

    def read_stream(frames):
        stream = ((i / 10, frame) for i, frame in enumerate(frames))
        return [len(faces) for _, _, faces in utils.analyse(stream, detector, net)]

    def read_pictures(frames):
        return [len(utils.read_emotions(frame, detector, net)) for frame in frames]

    return read_stream, read_pictures, lambda face: int(net.predict(face[None]).argmax())


def open_fer(fer):
    """The same of fer, to which a stream is single pictures. Without a margin around a face it is more often right."""
    detector, cut_out = fer.FER(), fer.FER(offsets=(0, 0))

    def read(frames):
        return [len(detector.detect_emotions(frame)) for frame in frames]

    def classify(face):
        scores = cut_out.detect_emotions(np.dstack([face] * 3), [(0, 0, *face.shape)])[0]["emotions"]
        return max(range(7), key=lambda label: scores[LABELS[label]])

    return read, read, classify


def open_deepface(deepface):
    """The same of DeepFace."""

    def analyze(frame, **options):
        return deepface.analyze(frame, actions=["emotion"], enforce_detection=False, silent=True, **options)

    def read(frames):
        return [sum(face["face_confidence"] > 0 for face in analyze(frame)) for frame in frames]

    def classify(face):
        return LABELS.index(analyze(np.dstack([face] * 3), detector_backend="skip")[0]["dominant_emotion"])

    return read, read, classify


MODULES = {  # what is imported, and which of the functions above gets it
    "this project": ("utils", open_ours),
    "fer": ("fer.fer", open_fer),  # `from fer import FER`, as its page says, fails in 25.10.3
    "deepface": ("deepface.DeepFace", open_deepface),
}


def peak_memory():
    """Return the largest resident memory of this process so far, in MB. getrusage would count its parent's too."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def work(project, folder):
    """Import a project and read a first frame; then read what each line of stdin names. Prints a JSON line for each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the projects print, too

    def answer(**figures):
        print(json.dumps(figures), file=answers, flush=True)

    module, open_project = MODULES[project]
    if project == "this project":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    began = time.perf_counter()
    module = importlib.import_module(module)
    imported = time.perf_counter() - began
    read_stream, read_pictures, classify = open_project(module)
    read_pictures(np.load(folder / "first.npy"))
    answer(**{"import": imported})
    for line in sys.stdin:
        name = line.strip()
        frames, clock = np.load(folder / f"{name}.npy"), [time.process_time()]
        if name == "test":
            answer(accuracy=float(np.mean([classify(face) for face in frames] == np.load(folder / "labels.npy"))))
            continue
        for read in (read_stream, read_pictures):
            found = read(frames)
            clock.append(time.process_time())
        stream, picture = 1000 * np.diff(clock) / len(frames)
        figures = {"stream": stream, "picture": picture, "faces": float(np.mean(found)), "memory": peak_memory()}
        answer(**{f"{name}, {figure}": value for figure, value in figures.items()})


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
