"""Finds the kernels among a checkpoint's arrays, and a ``Conv`` for each by what the user says of them."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from opnorm_jax._cli.batch_norm import EPSILON, follower, variances
from opnorm_jax._cli.checkpoint import Checkpoint, Entry, UserError
from opnorm_jax._conv import SPATIAL_LETTERS, Conv, Unknown, member_shape
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
    "batch_norm",
)
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_KERNEL_NAMES = {"weight": "OIHW", "kernel": "HWIO", "w": "HWIO"}  # PyTorch and Equinox; Flax; Haiku
_WIDEST = 11  # taps of the largest kernels in wide use


class Kernels(NamedTuple):
    """What a checkpoint holds."""

    convs: dict[str, Conv]
    unknown: dict[str, Unknown]  # kernels that no Conv describes, with the reason
    skipped: list[str]  # arrays that are no kernels of convolutions
    notes: list[str]  # what was assumed
    batch_norms: dict[str, str]  # the layers whose factors are folded into a kernel, by the kernel's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that describe the layers."""
    group = parser.add_argument_group("the layers")
    group.add_argument(
        "--input-shape", type=int, nargs="+", metavar="N", help="spatial shape of every layer's input, e.g. 32 32"
    )
    group.add_argument(
        "--strides", type=int, nargs="+", metavar="N", help="of every layer: one number, or one per axis (default 1)"
    )
    group.add_argument(
        "--padding",
        nargs="+",
        default=["SAME"],
        metavar="P",
        help="of every layer: SAME (default), VALID, CIRCULAR, ...; or a number of pixels, or one per axis",
    )
    group.add_argument("--layout", metavar="L", help="of the kernels: HWIO or OIHW (default: told by names and shapes)")
    group.add_argument(
        "--layers",
        type=Path,
        metavar="FILE.json",
        help='{"PATTERN": {"input_shape": [32, 32], "strides": 2, ...}, ...}: the arguments of opnorm_jax.Conv for the '
        "kernels whose path, or layer, a pattern matches; they override the flags, and later patterns earlier ones. "
        '"batch_norm" names the layer that is folded into a kernel',
    )
    group.add_argument(
        "--fold-batch-norm",
        type=positive,
        nargs="?",
        const=EPSILON,
        metavar="EPSILON",
        help="multiply kernels by the batch normalisation behind them, which is told by its name (conv1, bn1); EPSILON "
        f"is what the layer adds to its variance (default {EPSILON:g})",
    )
    group.add_argument("--include", metavar="REGEX", help="only kernels whose path matches")
    group.add_argument("--exclude", metavar="REGEX", help="no kernels whose path matches")


def positive(text: str) -> float:
    """Reads a positive number."""
    value = float(text)
    if not np.finfo(np.float32).tiny <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number that float32 can hold, got {text}.")
    return value


def find_kernels(checkpoint: Checkpoint, options: argparse.Namespace) -> Kernels:
    """Describes the kernels of a checkpoint by the flags of :func:`add_arguments`."""
    entries = checkpoint.entries
    rules = _read_rules(options.layers)
    defaults: dict[str, Any] = {"strides": _one_or_all(options.strides or [1]), "padding": _padding(options.padding)}
    if options.input_shape is not None:
        defaults["input_shape"] = options.input_shape
    for pattern in rules:
        if not any(_matches(pattern, name) for name in entries):
            close = difflib.get_close_matches(pattern, [*entries, *map(_stem, entries)], n=1, cutoff=0)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(f"{pattern!r} matches no array of {checkpoint.path}{hint}.")

    factors = find_factors(checkpoint.names)
    chosen = _choose(entries, options)
    settings: dict[str, dict[str, Any]] = {}
    unknown, skipped = {}, []
    for name in sorted(chosen, key=natural_key):
        entry, found = chosen[name], dict(defaults)
        for pattern, given in rules.items():
            if _matches(pattern, name):
                found |= given
        axes = _axes(name, found) if "input_shape" in found else None
        shaped = len(entry.shape) > 2 if axes is None else len(entry.shape) == axes
        named = any(pattern in _spellings(name) for pattern in rules)
        if name in factors and entry.dtype in _FLOATS and (shaped or named or len(entry.shape) > 2):
            unknown[name] = Unknown(factors[name])
        elif shaped and entry.dtype not in _FLOATS and (named or _is_suspect(name, entry.dtype)):
            unknown[name] = Unknown(_wrong_dtype(entry.dtype))
        elif shaped and entry.dtype in _FLOATS:
            if axes is None:
                unknown[name] = Unknown("no input shape given: --input-shape, or --layers with a file")
            else:
                settings[name] = found
        elif named and axes is not None:
            raise UserError(
                f"{name}: expected a kernel of {axes} axes for input_shape={found['input_shape']}, got "
                f"shape {entry.shape}, {entry.dtype}. It is no convolution of that kind."
            )
        else:
            skipped.append(name)
    if not settings:
        reasons = "; ".join(f"{name}: {found.reason}" for name, found in [*unknown.items()][:4])
        raise UserError(
            f"no convolution kernels are left to look at, of {len(entries)} arrays in {checkpoint.path}, "
            f"{len(chosen)} of them selected. "
            + (reasons or "None is a floating array of as many axes as the input shape plus 2.")
        )
    notes = _set_layouts(settings, entries, options.layout)
    batch_norms = _batch_norms(checkpoint, settings, options.fold_batch_norm is not None)
    convs = {name: _conv(name, entries[name], found) for name, found in settings.items()}
    return Kernels(convs, unknown, skipped, notes, batch_norms)


def _batch_norms(checkpoint: Checkpoint, settings: dict[str, dict[str, Any]], by_name: bool) -> dict[str, str]:
    """Takes the batch normalisations out of the settings; those that were not given are found by their names."""
    given = {name: found.pop("batch_norm") for name, found in settings.items() if "batch_norm" in found}
    for name, norm in given.items():
        if norm is not None and not isinstance(norm, str):
            raise UserError(f'{name}: expected "batch_norm" to be a layer\'s name or null, got {norm!r}.')
    found = {name: norm for name, norm in given.items() if norm is not None}
    if by_name:
        norms = variances(checkpoint.names)
        for name in settings:
            if name not in given and (norm := follower(_stem(name), norms)) is not None:
                found[name] = norm
        if not found:
            raise UserError(
                f"no kernel's name tells the batch normalisation behind it ({len(norms)} found by their running "
                'variances); name it by "batch_norm" in the file of --layers.'
            )
    return found


def find_factors(names: Iterable[str]) -> dict[str, str]:
    """Finds arrays from which a layer's weight is computed, and which are not that weight; says what to do instead.

    PyTorch's weight and spectral normalisation and its pruning, under the names of torch.nn.utils and of
    torch.nn.utils.parametrizations; Flax's WeightNorm and SpectralNorm; masks, the gains of standardised kernels, and
    low-rank changes, by the names that they have beside a kernel.
    """
    names = set(names)
    remedy = "save the model after {}, which leaves the weight itself, or leave this array out with --exclude"
    parametrized = remedy.format("torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')")
    factors: dict[str, str] = {}
    for name in names:
        base, kind = name[:-2], name[-2:]
        if kind in ("_g", "_v") and {base + "_g", base + "_v"} <= names and base + "_orig" not in names:
            how = remedy.format("torch.nn.utils.remove_weight_norm(layer)")
            factors[name] = f"a factor: the weight is computed from {_last(base)}_g and {_last(base)}_v; {how}"
        elif name.endswith("_orig"):
            base = name.removesuffix("_orig")
            undo = "torch.nn.utils.remove_spectral_norm(layer)"
            if base + "_mask" in names:
                undo = f"torch.nn.utils.prune.remove(layer, {_last(base)!r})"
            factors[name] = f"not the weight that the layer uses, which is computed from it; {remedy.format(undo)}"
        elif re.search(r"(^|[./])parametrizations[./][^./]+[./]original\d*$", name):
            factors[name] = f"a factor: the layer's weight is computed from it; {parametrized}"
        elif found := re.search(r"(^|/)(WeightNorm|SpectralNorm)_\d+/(.+)/(scale|sigma|u)$", name):
            how = "store the normalised kernel in its place, or leave this array out with --exclude"
            for kernel in names:
                if kernel == found[3] or kernel.endswith("/" + found[3]):
                    factors[kernel] = f"not the kernel that the layer uses, which Flax's {found[2]} normalises; {how}"
    for name, (companion, what, computed) in itertools.product(names, _COMPANIONS):
        if found := re.fullmatch(companion, _plain(name)):
            factors.setdefault(name, f"{what}, not a layer's weight; leave it out with --exclude")
            how = (
                "store the weight that it uses in its place, without the other, or leave this array out with --exclude"
            )
            for kernel in names & _beside(found):
                factors.setdefault(kernel, f"not the weight that the layer uses, {computed} {_last(name)}; {how}")
    return factors


_COMPANIONS = (
    (r"(?P<layer>.*[./])?((?P<kernel>\w+)_)?mask", "a mask", "which is masked by"),
    (r"(?P<layer>.*[./])?gain", "the gain of a standardised kernel", "which is standardised and multiplied by"),
    (r"(?P<layer>.*[./])?lora_\w+([./].*)?", "part of a low-rank change", "to which is added the low-rank change"),
)
"""Arrays beside a kernel that change it: their names, what they are, and how."""


def _beside(found: re.Match[str]) -> set[str]:
    """Returns the names that the kernel may have which an array changes."""
    groups = found.groupdict()
    kernels = [groups["kernel"]] if groups.get("kernel") else _KERNEL_NAMES
    folders = [groups["layer"] or "", (groups["layer"] or "") + "base_layer."]
    return {folder + kernel + end for folder in folders for kernel in kernels for end in ("", "_orig", "/value")}


def _is_suspect(name: str, dtype: str) -> bool:
    """Tells whether an array of a dtype that cannot be computed with may be a kernel: masks and indices are not."""
    return _last(name) in _KERNEL_NAMES or not re.match(r"u?int\d|bool", dtype.lower())


def _wrong_dtype(dtype: str) -> str:
    if dtype.startswith("complex"):
        advice = "a complex layer is the real one with the kernel [[Re, Im], [-Im, Re]] on its channels: store that"
    elif re.match(r"u?int\d", dtype):
        advice = "a quantised kernel: multiply by its scale and store it as float32"
    else:
        advice = "store it as float32"
    return f"of dtype {dtype}, not one of {', '.join(_FLOATS)}; {advice}"


def _one_or_all(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(numbers) == 1 else numbers


def _padding(words: list[str]) -> Any:
    read = [int(word) if re.fullmatch(r"-?\d+", word) else word.upper() for word in words]
    return read[0] if len(read) == 1 else read


def _conv(name: str, entry: Entry, found: dict[str, Any]) -> Conv:
    try:
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
    if not isinstance(shape, list) or not isinstance(stacked, (int, list)):
        raise UserError(
            f"{name}: expected input_shape to be a list of ints and stacked an int or a list of them, got {shape!r}, "
            f"{stacked!r}."
        )
    if len(shape) >= len(SPATIAL_LETTERS):
        raise UserError(f"{name}: expected input_shape to hold 1 to 3 numbers (no batch, no channels), got {shape}.")
    return len(shape) + 2 + (stacked if isinstance(stacked, int) else len(stacked))


def _member(name: str, entry: Entry, found: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the shape of one kernel."""
    try:
        return member_shape(entry.shape, Conv(found["input_shape"], stacked=found.get("stacked", 0)))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} {entry.shape}: {error}") from None


def _choose(entries: Mapping[str, Entry], options: argparse.Namespace) -> dict[str, Entry]:
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


def _read_rules(path: Path | None) -> dict[str, dict[str, Any]]:
    """Reads the arguments of ``Conv`` by pattern."""
    if path is None:
        return {}
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a file, got a folder, a pipe or a device.")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}).") from None
    if not isinstance(content, dict) or not all(isinstance(given, dict) for given in content.values()):
        raise UserError(f'{path}: expected {{"PATTERN": {{"input_shape": [32, 32], ...}}, ...}}.')
    for name, given in content.items():
        if extra := sorted(set(given) - set(_KEYS)):
            raise UserError(f"{path}, {name!r}: unknown {extra}; expected some of {', '.join(_KEYS)}.")
    return content


def _matches(pattern: str, name: str) -> bool:
    return any(pattern == text or fnmatch.fnmatchcase(text, pattern) for text in _spellings(name))


def _spellings(name: str) -> tuple[str, ...]:
    """Returns what a pattern may be compared with: a kernel's name, without NNX's last word, and its layer's."""
    return name, _plain(name), _stem(name)


def _stem(name: str) -> str:
    """Returns the layer that a kernel belongs to."""
    return re.sub(r"[./](weight|kernel|w)$", "", _plain(name))


def _last(name: str) -> str:
    return re.split("[./]", _plain(name))[-1]


def _plain(name: str) -> str:
    """Returns a name without the last word of those in a state of Flax NNX."""
    return name.removesuffix("/value")


def _set_layouts(settings: dict[str, dict[str, Any]], entries: Mapping[str, Entry], given: str | None) -> list[str]:
    """Fills in the layouts that were not given one by one, and returns what was assumed."""
    open_ = {name: found for name, found in settings.items() if "kernel_layout" not in found}
    if not open_:
        return []
    shapes = {name: _member(name, entries[name], found) for name, found in open_.items()}
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
    return _KERNEL_NAMES.get(_last(name))


def _by_shape(shape: tuple[int, ...]) -> str | None:
    """Returns the only layout with few taps; if both have few, the one with equally many on every axis."""
    if len(shape) < 3:
        return None
    taps = {"OIHW": shape[2:], "HWIO": shape[:-2]}
    few = [layout for layout, sizes in taps.items() if max(sizes) <= _WIDEST]
    if len(few) == 2:
        few = [layout for layout in few if len(set(taps[layout])) == 1 and len(shape) > 3]
    return few[0] if len(few) == 1 else None
