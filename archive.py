"""A recording, or a segment of it, becomes a Parquet file, and a folder of these a data set.

For notebooks/09_video_archive.ipynb: `python archive.py REQUEST` is the child process in which it reads a recording.
pyarrow is imported only by the functions that need it.
"""

import csv
import hashlib
import json
import os
import sys
import threading
from collections import deque
from pathlib import Path

import cv2

import utils

SIDES = ("left", "top", "right", "bottom")  # of a face's square, in pixels
TOLD = b"annotate_videos"  # under this name the metadata of a part say what it was made of
RUN_UP = 5.0  # seconds before a segment, at least, that are analysed too, but not kept

# -------------------------------------------------------------------------------------------------- the data set


def schema():
    """Return the columns of the data set as a pyarrow.Schema. A row is a face in an answer of the live stream."""
    import pyarrow as pa

    place = [("track", pa.int32()), *((side, pa.int32()) for side in SIDES), ("score", pa.float32())]
    probabilities = [(emotion, pa.float32()) for emotion in utils.EMOTIONS]
    return pa.schema(
        [("video", pa.string()), ("seconds", pa.float64()), *place, *probabilities, ("emotion", pa.string())]
    )


def part_path(folder, video, number=None):
    """Return the path of a video's part, or of that of its segment `number`. No two videos have the same."""
    video = os.path.realpath(video)  # one recording has one part, however its path is spelled
    name = f"{Path(video).stem[:40]}-{hashlib.sha256(os.fsencode(video)).hexdigest()[:12]}"
    place = f"answers/{name}.parquet" if number is None else f"segments/{name}-{number}.parquet"
    return Path(folder, place)


def read_told(path):
    """Return what the metadata of a part tell, or {} if there is no such part, or an empty one, as after a power cut.

    Raises:
        utils.InputError: it is another file than this module writes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file() or not path.stat().st_size:
        return {}
    try:
        found = pq.read_schema(path)
    except pa.ArrowInvalid:
        found = pa.schema([])
    if not found.equals(schema()) or TOLD not in (found.metadata or {}):
        raise utils.InputError(f"{utils.show_path(path)} is no part of such a data set: give another --output")
    return json.loads(found.metadata[TOLD])


def write_part(table, told, path):
    """Write a pyarrow.Table, with a dict as its metadata, as a Parquet file; the whole or nothing."""
    import pyarrow.parquet as pq

    with utils.replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata({TOLD: json.dumps(told)}), temporary, compression="zstd")


def join_segments(path, signature, segments):
    """Write a video's part from those of its segments, and remove these.

    Args:
        path: of the part.
        signature: what it was made of, for its metadata.
        segments: dict of the path of each segment's part to what `annotate` told of it, in order.

    Returns:
        what the metadata tell: `signature`, `end`, the length of the video in seconds, and `broken`, the error where it
        breaks off, or empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, place = [], schema().get_field_index("track")
    for part, ids in zip(segments, join_tracks(segments.values()), strict=True):
        rows = pq.read_table(part)
        tracks = pa.array([ids[number] for number in rows["track"].to_pylist()], schema().field(place).type)
        tables.append(rows.set_column(place, schema().field(place), tracks))
    told = {
        "signature": signature,
        "end": max(told["end"] for told in segments.values()),
        "broken": next((told["broken"] for told in segments.values() if told["broken"]), ""),
    }
    write_part(pa.concat_tables(tables), told, path)
    for part in segments:
        Path(part).unlink(missing_ok=True)
    return told


def join_tracks(segments):
    """Return the ids that the tracks of each segment have in the whole video, as a list of dict.

    A track goes on that of the segment before which was at the same time in the same place. The others are counted on,
    as they are in a video that is read at one go.

    Args:
        segments: what `annotate` told of them, in order.
    """
    count, last, joined = 0, {}, []
    for told in segments:
        ids, before = {}, dict(told["before"])
        for number, (seconds, *square) in before.items():
            overlaps = {
                i: utils.Face(*square).overlap(utils.Face(*other))
                for i, (when, *other) in last.items()
                if when == seconds
            }
            best = max(overlaps, key=overlaps.get, default=None)
            if best is not None and overlaps[best] > 0.5:
                ids[number] = best
        for number, place in told["after"]:
            if number not in ids and place != before.get(number):  # else it was gone before the segment began
                count += 1
                ids[number] = count
        last = {ids[number]: place for number, place in told["after"] if number in ids}
        joined.append(ids)
    return joined


class DataSet:
    """The Parquet data set of a run: what is done of each recording, what is to be done, and what failed.

    Attributes:
        requests: deque of those that are to be done; `take` adds to it.
        lengths: dict of a recording's path to its seconds, as far as they are known.
        failures: dict of a recording's path to the reason, those of other recordings too; failures.csv has the same.
    """

    def __init__(self, folder, paths, options, child):
        """Look at what is in `folder`; `options` are in the metadata of a part, `child` is only told to the child."""
        self.folder, self.child, self.requests, self.lengths, self.failures = folder, child, deque(), {}, {}
        self._sizes, self._segments = {}, {}  # in bytes; and what was told of each segment, None until it is
        if (folder / "failures.csv").is_file():
            with open(folder / "failures.csv", newline="", encoding="utf-8") as file:
                self.failures = {row["video"]: row["reason"] for row in csv.DictReader(file)}
        parts = {
            part: read_told(part) for part in (folder / "answers").glob("[!.]*.parquet")
        }  # refuses another data set
        for part, told in parts.items():
            if told:
                part.replace(part_path(folder, told["signature"]["video"]))  # a link on the way may lead elsewhere now
            else:
                part.unlink()  # nobody can read it
        for place in ("answers", "segments"):
            utils.remove_leftovers(folder / place)
        for path in paths:
            try:
                status = path.stat()
            except OSError as error:
                self._fail(str(path), f"no video: {error.strerror}")
                continue
            signature = {"video": str(path), "size": status.st_size, "time": status.st_mtime_ns, **options}
            told = read_told(part_path(folder, path))
            self._sizes[str(path)] = max(1, status.st_size)
            if told.get("signature") == signature:
                self._settle(told)
            else:
                self._ask(signature, [(0.0, None)])

    def seconds(self):
        """Return the seconds of all recordings, estimated by bytes where they are not known; None if none is known."""
        known = sum(self._sizes[video] for video in self.lengths)
        return sum(self.lengths.values()) / known * sum(self._sizes.values()) if known else None

    def take(self, request, answer):
        """Take an answer of `annotate`, write what is whole, and return how many seconds of video it has brought."""
        signature, video = request["signature"], request["signature"]["video"]
        if answer.get("fatal"):
            raise utils.InputError(f"{answer['error']}; what is done is kept: mend that, and the same command goes on")
        if "error" in answer:
            self._fail(video, answer["error"])
        elif "length" in answer:
            step, self.lengths[video] = 60 * signature["segment"], answer["length"]
            starts = [step * i for i in range(round(answer["length"] / step))]
            self._ask(signature, list(zip(starts, [*starts[1:], None], strict=True)))
        elif video in self._segments:  # else another segment has failed
            self._segments[video][request["part"]] = answer
            if all(self._segments[video].values()):
                segments = self._segments.pop(video)
                self._settle(join_segments(part_path(self.folder, video), signature, segments))
            return max(0.0, answer["end"] - request["start"])
        return 0.0

    def _ask(self, signature, segments):
        """Put requests for segments, (start, stop) in seconds, before all others: a video is done before the next."""
        parts = [str(part_path(self.folder, signature["video"], i)) for i in range(len(segments))]
        self._segments[signature["video"]] = dict.fromkeys(parts)
        for part, (start, stop) in reversed(list(zip(parts, segments, strict=True))):
            self.requests.appendleft({"signature": signature, "start": start, "stop": stop, "part": part} | self.child)

    def _settle(self, told):
        """Take a recording as done: what its part tells is what failures.csv says of it."""
        video = told["signature"]["video"]
        self.lengths[video] = told["end"]
        before = self.failures.pop(video, "")
        if broken := told.get("broken"):  # parts of older versions do not tell
            self.failures[video] = " ".join(broken.split())
        if self.failures.get(video, "") != before:
            self._write_failures()

    def _fail(self, video, reason):
        for known in (self._sizes, self._segments, self.lengths):
            known.pop(video, None)
        kept = [request for request in self.requests if request["signature"]["video"] != video]
        self.requests.clear()  # in place, since it is being read
        self.requests.extend(kept)
        self.failures[video] = " ".join(reason.split())
        self._write_failures()

    def _write_failures(self):
        with utils.replacing(self.folder / "failures.csv") as path:
            with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                csv.writer(file).writerows([("video", "reason"), *self.failures.items()])


# --------------------------------------------------------------------------------------------------- a recording


def read_answers(video, start, stop, every, rate, smoothing, net):
    """Return the rows of a video between two times, and what joins them to those of the segments beside it.

    Args:
        video: utils.Video, opened at `start` or earlier.
        start, stop: in seconds; a frame at `start` counts, one at `stop` does not.
        every, rate, smoothing: as those of the live stream.
        net: utils.EmotionNet.

    Returns:
        list of rows in the order of `schema`, and a dict: `before` and `after`, the newest place (seconds, x, y, side)
        of each track when the segment began and ended, as pairs with its id; `end`, when the last frame ended;
        `broken`, the error where the video breaks off, or empty.
    """
    due, rows, newest, before, end, broken = utils.Schedule(1 / every), [], {}, None, 0.0, ""
    detector = utils.FaceDetector()
    try:
        for seconds, _, faces in utils.analyse(video, detector, net, smoothing, rate):
            if seconds >= stop - 1e-6:
                break
            if before is None and seconds >= start - 1e-6:
                before = list(newest.items())
            newest |= {number: (seconds, face.x, face.y, face.side) for number, face, _ in faces}
            end = seconds + 1 / video.fps
            if due.is_due(seconds) and before is not None:
                for number, face, probabilities in sorted(faces, key=lambda face: face[0]):
                    emotion, _ = utils.name_emotion(probabilities)
                    found = (number, *face.box, face.score, *map(float, probabilities), emotion)
                    rows.append((video.source, seconds, *found))
    except utils.InputError as error:
        broken = str(error)
    before = list(newest.items()) if before is None else before
    return rows, {"before": before, "after": sorted(newest.items()), "end": end, "broken": broken}


def annotate(request):
    """Write the part of a video, or of a segment, unless it is there, and return what is told of it.

    A video that is longer than one and a half segments is only looked at: its `length` in seconds is returned.

    Args:
        request: dict: `signature`, what the rows are made of; `start` and `stop` in seconds, None for the end; `part`,
            the path to write; `model`, the path of a .tflite model.
    """
    import pyarrow as pa

    signature, start, stop, part = (request[name] for name in ("signature", "start", "stop", "part"))
    told = read_told(Path(part))
    if told.get("request") == request:  # a worker may be lost after that, and its tasks are given to another one
        return told
    options = {name: signature[name] for name in ("every", "rate", "smoothing")}
    early = max(0.0, start - max(RUN_UP, 10 * options["smoothing"]))
    video = utils.Video(signature["video"], rate=options["rate"], start=early, threads=1)
    if not start and stop is None and 0 < 1.5 * 60 * signature["segment"] < video.length:
        return {"length": video.length}
    stop = float("inf") if stop is None else stop
    rows, told = read_answers(video, start, stop, **options, net=utils.EmotionNet(request["model"]))
    told["request"] = request
    columns = zip(*rows, strict=True) if rows else [()] * len(schema())
    arrays = [pa.array(list(column), kind) for column, kind in zip(columns, schema().types, strict=True)]
    write_part(pa.table(arrays, schema()), told, Path(part))
    return told


# --------------------------------------------------------------------------------------------- the child process


def limit_memory(gigabytes):
    """Let this process take no more memory than that, where the system can."""
    if sys.platform == "linux":
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = round(gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most < 0 else min(wanted, most), most))


def main():
    """Do the request of the command line, and print the answer, both JSON; what failed is told as `error`.

    One core is used, as there is a worker of Dask for each. The process ends when the worker does, which holds the
    other end of its standard input.
    """
    request = json.loads(sys.argv[1])
    threading.Thread(target=lambda: os._exit(len(sys.stdin.read()) + 1), daemon=True).start()
    cv2.setNumThreads(1)
    limit_memory(request["memory"])
    shown = utils.show_path(request["signature"]["video"])
    try:
        answer = annotate(request)
    except (MemoryError, cv2.error) as error:
        lacks = isinstance(error, MemoryError) or error.code == cv2.Error.StsNoMem
        why = f"takes more than --memory {request['memory']:g} GB" if lacks else f"cannot be read: {error}"
        answer = {"error": f"{shown} {why}"}
    except utils.InputError as error:
        answer = {"error": str(error)}
    except OSError as error:  # of the output; what is wrong with the video is an InputError
        answer = {"error": f"cannot write {utils.show_path(request['part'])}: {error.strerror}", "fatal": True}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
