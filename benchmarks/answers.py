"""Is it the answer that was due? Every picture of every API is decoded, and compared with what was asked for.

    answers = Answers(exact=True)
    answers.judge({"prompt": "red apple", "seed": 7, "steps": 2, …}, reply)          # "served"

A wrong answer is told in words that begin with `wrong`.
"""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.pictures import problem_with
from benchmarks.wire import Reply
from cdm_serve.images import read_parameters

PNG_END = b"IEND\xaeB`\x82"
KEPT = 1000
"""Pictures kept to compare later ones with."""
CLOSE = 12.0
"""Mean difference of colour values, of 255, up to which two pictures are the same one made in different batches."""
LAST_EVENTS = ("picture", "image_generation.completed")

Body = dict[str, Any]


class Answers:
    """Judges answers; keeps pictures, so that the same question must be answered alike each time.

    `exact`: a picture's bytes may not depend on its batch.
    """

    def __init__(self, exact: bool) -> None:
        self.compared = 0
        self.largest = 0.0
        """Mean difference of the two pictures that differed most."""
        self._exact = exact
        self._kept: dict[tuple[Any, ...], NDArray[np.uint8]] = {}

    def judge(self, asked: Body, reply: Reply) -> str:
        """`served`, `refused` or what is wrong. `asked`: the fields of `POST /generate`, whichever API it went to."""
        if reply.status == 429:
            waits = reply.headers.get("retry-after", "")
            return "refused" if waits.isdecimal() else f"wrong: 429 with retry-after={waits!r}"
        if reply.status != 200:
            return f"wrong: {reply.status} {reply.body[:200]!r}"
        try:
            previews, pictures = _pictures(reply)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return f"wrong: {type(error).__name__}: {error} in {reply.body[:100]!r}"
        if len(pictures) != asked.get("num_images", 1):
            return f"wrong: {len(pictures)} pictures"
        problems = [
            *(_damage(asked, data) for data in previews),
            *(self._problem(asked, index, data) for index, data in enumerate(pictures)),
        ]
        return next((f"wrong: {problem}" for problem in problems if problem), "served")

    def rejected(self, reply: Reply, status: int) -> str:
        """`rejected` if the answer is an error of that status, which says why."""
        if reply.status != status:
            return f"wrong: {reply.status} instead of {status}: {reply.body[:200]!r}"
        return "rejected" if reply.body else f"wrong: {status} without a word"

    def _problem(self, asked: Body, index: int, data: bytes) -> str:
        if problem := _damage(asked, data):
            return problem
        made = read_parameters(data)
        wanted = {"prompt": asked["prompt"], "seed": asked["seed"] + index}
        if asked["steps"] != "auto":
            wanted["steps"] = asked["steps"]
        for name, value in wanted.items():
            if made[name] != value:
                return f"made with {name}={made[name]!r}, asked for {value!r}"
        # One that may be shortened while it is made need not take the sigmas that so many steps have otherwise.
        return "" if asked["steps"] == "auto" else self._differs(tuple(made.values()), data)

    def _differs(self, key: tuple[Any, ...], data: bytes) -> str:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image)
        first = self._kept.get(key)
        if first is None:
            if len(self._kept) < KEPT:
                self._kept[key] = pixels
            return ""
        far = float(np.abs(pixels.astype(np.int16) - first).mean())
        self.compared += 1
        self.largest = max(self.largest, far)
        return f"{key} differs by {far:.2f} from before" if far > (0.0 if self._exact else CLOSE) else ""


def _damage(asked: Body, data: bytes) -> str:
    """What is wrong with a file, whatever it shows. (Pillow does not mind a PNG without its end.)"""
    if problem := problem_with(data, asked["width"], asked["height"], "png"):
        return problem
    return "" if data.endswith(PNG_END) else "cut off"


def _pictures(reply: Reply) -> tuple[list[bytes], list[bytes]]:
    """The files of previews and of pictures in an answer of any API."""
    media = reply.headers.get("content-type", "").partition(";")[0]
    if media.startswith("image/"):
        return [], [reply.body]
    if media == "text/event-stream":
        return _events(reply.body)
    if media == "application/octet-stream":
        length = int(reply.headers["inference-header-content-length"])
        json.loads(reply.body[:length])
        size = int.from_bytes(reply.body[length : length + 4], "little")
        return [], [reply.body[length + 4 : length + 4 + size]]
    document = json.loads(reply.body)
    return [], [_file(entry) for entry in document.get("images") or document["data"]]


def _events(body: bytes) -> tuple[list[bytes], list[bytes]]:
    """Of a stream that has all its previews before its one picture, and nothing behind that."""
    blocks = body.decode().split("\n\n")
    if blocks.pop():
        raise ValueError("the last event is not ended")
    events = []
    for block in blocks:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    if events[-1][0] not in LAST_EVENTS or any(name in LAST_EVENTS for name, _ in events[:-1]):
        raise ValueError(f"events {[name for name, _ in events]}")
    *previews, picture = [_file(entry) for _, entry in events]
    return previews, [picture]


def _file(entry: Body) -> bytes:
    return base64.b64decode(entry["b64_json"], validate=True)
