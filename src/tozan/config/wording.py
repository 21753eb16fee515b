"""What is said about a value that a field does not allow: the value, the rule with its numbers, what to write."""

from __future__ import annotations

import difflib
import re
import tomllib
from typing import Any

from tozan.config.fields import Field, number, show
from tozan.config.sources import Written, snippet
from tozan.errors import Problem

OTHER_WORDS = {
    "bfloat16": "bf16",
    "bf16-mixed": "bf16",
    "float16": "fp16",
    "16-mixed": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "tf32": "fp32",
    "32-true": "fp32",
    "gpu": "cuda",
    "cuda:0": "cuda",
    "gpt": "gpt2",
    "gpt-2": "gpt2",
    "llama2": "llama",
    "llama3": "llama",
    "warmup-stable-decay": "wsd",
    "error": "refuse",
    "ignore": "skip",
    "block": "full",
    "all": "full",
}
"""Other trainers' words for our choices."""

YES_AND_NO = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}


def refused(spec: Field, written: Written) -> Problem:
    """The problem with a value that its field does not allow."""
    if spec.key == "version":
        fix = "write `version = 1` as the first line; a newer version needs a newer tozan"
        return Problem(written.origin, f"version is {show(written.value)}, but this tozan reads version 1", fix)
    if spec.key == "model.preset" and isinstance(written.value, str):
        what = f"there is no preset {show(written.value)}"
        near = difflib.get_close_matches(written.value.lower(), spec.choices, 1, 0.4)
        fix = f"did you mean {show(near[0])}? " if near else ""
        return Problem(written.origin, what, f"{fix}The presets are {', '.join(spec.choices)}")
    what = f"{spec.key} is {show(written.value)}, but must be {spec.allowed()}"
    better = _meant(spec, written.value)
    if better is not None:
        return Problem(written.origin, what, f"write {snippet(spec, better, written.origin)}")
    bound = _bound(spec, written.value)
    if bound is not None:
        return Problem(written.origin, what, f"write {bound}")
    example = spec.example if spec.example is not None else spec.default
    if example is None:
        return Problem(written.origin, what, f"leave {spec.name} out for its default, or write {spec.allowed()}")
    default = " (the default)" if example == spec.default else ""
    return Problem(written.origin, what, f"write such as {snippet(spec, example, written.origin)}{default}")


def missing(spec: Field, file: str | None, header: str | None) -> Problem:
    """The problem with a required key that nobody wrote."""
    what = f"{spec.key} is missing: {spec.text}"
    line = f"`{spec.name} = {show(spec.example)}`"
    if file is None:
        return Problem(f"--{spec.key}", what, f"add {snippet(spec, spec.example, '--')}")
    place = f"under [{spec.table}]" if spec.table else "as the first line"
    flag = f", or the flag {snippet(spec, spec.example, '--')}" if spec.table else ""
    return Problem(header or file, what, f"add {line} {place}{flag}")


def _meant(spec: Field, value: Any) -> Any:
    """The allowed value that the written one plainly stands for, or None."""
    if spec.choices:
        word = str(value).strip().lower()
        if OTHER_WORDS.get(word) in spec.choices:
            return OTHER_WORDS[word]
        near = difflib.get_close_matches(word, [str(choice) for choice in spec.choices], 1, 0.65)
        return near[0] if near else None
    if spec.kind == "boolean":
        return YES_AND_NO.get(str(value).lower())
    if spec.kind == "string":
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    if spec.kind == "array":
        text = str(value).strip("[]()")
        return [int(part) for part in text.split(",")] if re.fullmatch(r"\d+\s*,\s*\d+", text) else None
    return _meant_number(spec, value)


def _meant_number(spec: Field, value: Any) -> int | float | None:
    if isinstance(value, str):
        text = value.strip().replace(",", "")
        text = re.sub(r"^([-+]?)\.", r"\g<1>0.", text)
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if spec.kind == "integer":
        if abs(value) > 1e15 or value != value or value != int(value):
            return None
        value = int(value)
    return value if _inside(spec, value) else None


def _inside(spec: Field, value: float) -> bool:
    low = spec.low is None or (value > spec.low if spec.low_open else value >= spec.low)
    return low and (spec.high is None or (value < spec.high if spec.high_open else value <= spec.high))


def _bound(spec: Field, value: Any) -> str | None:
    """For a number outside the bounds: what is inside, with an example."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    if spec.kind not in ("integer", "number") or (spec.kind == "integer" and isinstance(value, float)):
        return None
    low = spec.low is not None and value <= spec.low
    edge, is_open = (spec.low, spec.low_open) if low else (spec.high, spec.high_open)
    words = ("more than", "or more") if low else ("less than", "or less")
    text = f"{words[0]} {number(edge)}" if is_open else f"{number(edge)} {words[1]}"
    example = spec.example if spec.example is not None else spec.default
    return text if example is None else f"{text}, such as {show(example)}"
