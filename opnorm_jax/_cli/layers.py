"""From a checkpoint's arrays, and what the user says of them, to a ``Conv`` at each kernel."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from opnorm_jax._cli.checkpoint import Checkpoint, Entry, UserError
from opnorm_jax._conv import SPATIAL_LETTERS, Conv, Unknown
from opnorm_jax._tree.layers import Layer, natural_key

_KEYS = (
    "input_shape",
    "strides",
    "padding",
    "input_dilation",
    "kernel_dilation",
    "feature_group_count",
    "kernel_layout",
    "stacked",
)
_SHORT = {
    "stride": "strides",
    "dilation": "kernel_dilation",
    "groups": "feature_group_count",
    "layout": "kernel_layout",
}
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_WIDEST = 11  # taps of the largest kernels in wide use


class Described(NamedTuple):
    """A checkpoint's layers."""

    convs: dict[str, Conv]
    unknown: dict[str, Unknown]  # shaped like kernels, but no input shape was given
    skipped: list[str]  # no kernels of convolutions
    notes: list[str]  # what was assumed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that describe the layers."""
    group = parser.add_argument_group("the layers")
    group.add_argument(
        "--input-shape", type=int, nargs="+", metavar="N", help="spatial shape of every layer's input, e.g. 32 32"
    )
    group.add_argument("--strides", type=_ints, default=1, metavar="N", help="of every layer (default 1)")
    group.add_argument(
        "--padding",
        type=parse_padding,
        default="SAME",
        metavar="P",
        help="of every layer: SAME (default), VALID, CIRCULAR, 1, 1x2 per axis, or 0:1 for low and high",
    )
    group.add_argument("--layout", metavar="L", help="of the kernels: HWIO or OIHW (default: told by names and shapes)")
    group.add_argument(
        "--input-shapes",
        type=Path,
        metavar="FILE.json",
        help='{"PATTERN": {"input_shape": [32, 32], "strides": 2, ...}, ...}: the arguments of opnorm_jax.Conv for the '
        "kernels a pattern matches; where several match, later ones prevail",
    )
    group.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PATTERN=H,W[:stride=2,padding=1,...]",
        help="the same for one pattern; prevails over the file. May be repeated",
    )
    group.add_argument("--include", metavar="REGEX", help="only kernels whose path matches")
    group.add_argument("--exclude", metavar="REGEX", help="no kernels whose path matches")


def parse_padding(text: str) -> Any:
    """``SAME``, ``1``, ``1x2``, ``0:1`` or ``0:1x0:1`` as :class:`Conv` takes it."""
    if text.upper() in ("SAME", "VALID", "CIRCULAR"):
        return text.upper()
    if not re.fullmatch(r"-?\d+(:-?\d+)?(x-?\d+(:-?\d+)?)*", text):
        raise argparse.ArgumentTypeError(
            f"expected SAME, VALID, CIRCULAR, a number, one per axis (1x2), or low:high, got {text!r}."
        )
    parts = [tuple(map(int, part.split(":"))) for part in text.split("x")]
    pads = [part if len(part) == 2 else part * 2 for part in parts]
    return pads if len(pads) > 1 else pads[0][0] if len(parts[0]) == 1 else _EveryAxis(pads[0])


def describe(checkpoint: Checkpoint, options: argparse.Namespace) -> Described:
    """The layers of a checkpoint, from the flags of :func:`add_arguments`."""
    entries = checkpoint.entries
    rules = [*_from_file(options.input_shapes), *map(_from_flag, options.layer)]
    defaults: dict[str, Any] = {"strides": options.strides, "padding": options.padding}
    if options.input_shape is not None:
        defaults["input_shape"] = options.input_shape
    chosen = _chosen(entries, options)
    for pattern, _ in rules:
        if not any(_matches(pattern, name) for name in entries):
            close = difflib.get_close_matches(pattern, [*entries, *map(_stem, entries)], n=1, cutoff=0)
            raise UserError(f"{pattern!r} matches no array of {checkpoint.path}{_hint(close)}.")

    settings: dict[str, dict[str, Any]] = {}
    unknown, skipped = {}, []
    for name in sorted(chosen, key=natural_key):
        found, entry = dict(defaults), chosen[name]
        named = False
        for pattern, given in rules:
            if _matches(pattern, name):
                found |= given
                named |= pattern in (name, _stem(name))
        if "input_shape" not in found:
            if len(entry.shape) > 2 and entry.dtype in _FLOATS:
                unknown[name] = Unknown("no input shape given: --input-shape, --layer or --input-shapes")
            else:
                skipped.append(name)
        elif _axes(name, found) == len(entry.shape) and entry.dtype in _FLOATS:
            settings[name] = found
        elif named:
            raise UserError(
                f"{name}: expected a kernel of {_axes(name, found)} axes for input_shape={found['input_shape']}, got "
                f"shape {entry.shape}, {entry.dtype}. It is no convolution of that kind."
            )
        else:
            skipped.append(name)
    if not settings:
        if unknown:
            raise UserError(
                f"expected an input shape for some of the {len(unknown)} kernels: pass --input-shape 32 32."
            )
        raise UserError(
            f"no convolution kernels are left: {len(entries)} arrays in {checkpoint.path}, {len(chosen)} of them "
            "selected, none a floating array of as many axes as the input shape plus 2."
        )
    notes = _set_layouts(settings, entries, options.layout)
    convs = {name: _conv(name, entries[name], found) for name, found in settings.items()}
    return Described(convs, unknown, skipped, notes)


class _EveryAxis(tuple):
    """A (low, high) pair to be repeated for each spatial axis."""


def _conv(name: str, entry: Entry, found: dict[str, Any]) -> Conv:
    try:
        if isinstance(found["padding"], _EveryAxis):
            found["padding"] = (tuple(found["padding"]),) * len(found["input_shape"])
        conv = Conv(found.pop("input_shape"), **found)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} {entry.shape}: {error}") from None
    try:
        Layer(name, jax.ShapeDtypeStruct(entry.shape, np.float32), conv).check()
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    return conv


def _axes(name: str, found: Mapping[str, Any]) -> int:
    shape, stacked = found["input_shape"], found.get("stacked", 0)
    if not isinstance(shape, list) or not isinstance(stacked, int):
        raise UserError(
            f"{name}: expected input_shape to be a list of ints and stacked an int, got {shape!r}, {stacked!r}."
        )
    if len(shape) >= len(SPATIAL_LETTERS):
        raise UserError(f"{name}: expected input_shape to hold 1 to 3 numbers (no batch, no channels), got {shape}.")
    return len(shape) + 2 + stacked


def _chosen(entries: Mapping[str, Entry], options: argparse.Namespace) -> dict[str, Entry]:
    def pattern(text, flag):
        try:
            return re.compile(text)
        except re.error as error:
            raise UserError(f"{flag} {text!r}: not a regular expression ({error}).") from None

    chosen = dict(entries)
    if options.include is not None:
        keep = pattern(options.include, "--include")
        chosen = {name: entry for name, entry in chosen.items() if keep.search(name)}
    if options.exclude is not None:
        drop = pattern(options.exclude, "--exclude")
        chosen = {name: entry for name, entry in chosen.items() if not drop.search(name)}
    return chosen


def _from_file(path: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if path is None:
        return
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}).") from None
    if not isinstance(content, dict) or not all(isinstance(given, dict) for given in content.values()):
        raise UserError(f'{path}: expected {{"PATTERN": {{"input_shape": [32, 32], ...}}, ...}}.')
    for name, given in content.items():
        if extra := sorted(set(given) - set(_KEYS)):
            raise UserError(f"{path}, {name!r}: unknown {extra}; expected some of {', '.join(_KEYS)}.")
        yield name, given


def _from_flag(text: str) -> tuple[str, dict[str, Any]]:
    found = re.fullmatch(r"(?P<name>.+?)=(?P<shape>\d+([x,]\d+)*)?(:(?P<options>.*))?", text)
    if not found or not (found["shape"] or found["options"]):
        raise UserError(f"--layer {text!r}: expected PATTERN=H,W[:stride=2,padding=1,...].")
    given: dict[str, Any] = {}
    if found["shape"]:
        given["input_shape"] = [int(n) for n in re.split("[x,]", found["shape"])]
    for option in filter(None, (found["options"] or "").split(",")):
        key, _, value = option.partition("=")
        key = _SHORT.get(key, key)
        if key not in _KEYS or key == "input_shape":
            close = difflib.get_close_matches(key, [*_KEYS, *_SHORT], n=1, cutoff=0)
            raise UserError(f"--layer {text!r}: unknown option {key!r}{_hint(close)}.")
        try:
            given[key] = parse_padding(value) if key == "padding" else value if key == "kernel_layout" else _ints(value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--layer {text!r}: {error}") from None
    return found["name"], given


def _ints(text: str) -> int | list[int]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected a number, or one per axis (1x2), got {text!r}.")
    numbers = [int(n) for n in text.split("x")]
    return numbers if len(numbers) > 1 else numbers[0]


def _matches(pattern: str, name: str) -> bool:
    return any(pattern == text or fnmatch.fnmatchcase(text, pattern) for text in (name, _stem(name)))


def _stem(name: str) -> str:
    """The layer a kernel belongs to."""
    return re.sub(r"[./](weight|kernel|w)$", "", name)


def _hint(close: list[str]) -> str:
    return f" (did you mean {close[0]!r}?)" if close else ""


def _set_layouts(settings: dict[str, dict[str, Any]], entries: Mapping[str, Entry], given: str | None) -> list[str]:
    """Fills in the layouts that were not given one by one; returns what was assumed."""
    open_ = {name: found for name, found in settings.items() if "kernel_layout" not in found}
    if not open_:
        return []
    shapes = {name: entries[name].shape[found.get("stacked", 0) :] for name, found in open_.items()}
    by_shape = {verdict for shape in shapes.values() if (verdict := _by_shape(shape))}
    by_name = {verdict for name in open_ if (verdict := _by_name(name))}
    notes = []
    if given is None:
        verdicts = by_name | by_shape if len(by_shape) < 2 else by_name
        if len(verdicts) != 1:
            told = "nothing tells" if not verdicts else "their names and shapes disagree about"
            raise UserError(f"{told} the layout of the kernels: pass --layout OIHW (PyTorch) or HWIO (Flax, Haiku).")
        (family,) = verdicts
        told = " and ".join(word for word, by in (("names", by_name), ("shapes", by_shape)) if family in by)
        notes.append(f"layout {family}, as the kernels' {told} tell (--layout to override)")
    else:
        family = given
    for name, found in open_.items():
        found["kernel_layout"] = layout = _for_rank(family, len(found["input_shape"]))
        taps = [shapes[name][layout.index(letter)] for letter in "DHW" if letter in layout]
        too_wide = any(k > n for k, n in zip(taps, found["input_shape"]))
        if given and too_wide and by_shape and family not in by_shape:
            raise UserError(
                f"{name} {entries[name].shape}: read as {layout} its taps are {'x'.join(map(str, taps))}, more than "
                f"its input's pixels. It looks like {min(by_shape)}: pass another --layout."
            )
    return notes


def _for_rank(family: str, rank: int) -> str:
    letters = SPATIAL_LETTERS[rank]
    if sorted(family) == sorted(letters + "IO"):
        return family
    if family.startswith("OI"):
        return "OI" + letters
    if family.endswith("IO"):
        return letters + "IO"
    raise UserError(f"expected --layout to be a permutation of {letters + 'IO'}, such as HWIO or OIHW, got {family!r}.")


def _by_name(name: str) -> str | None:
    last = re.split("[./]", name)[-1]
    return {"weight": "OIHW", "kernel": "HWIO", "w": "HWIO"}.get(last)


def _by_shape(shape: tuple[int, ...]) -> str | None:
    """The only layout with few taps; if both have few, the one with equally many on every axis."""
    if len(shape) < 3:
        return None
    taps = {"OIHW": shape[2:], "HWIO": shape[:-2]}
    few = [layout for layout, sizes in taps.items() if max(sizes) <= _WIDEST]
    if len(few) == 2:
        few = [layout for layout in few if len(set(taps[layout])) == 1 and len(shape) > 3]
    return few[0] if len(few) == 1 else None
