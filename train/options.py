"""The trainer's options: what they are, which are left open, and which of them a resumed run must share."""

import dataclasses
import hashlib
import json
import math
import re
import typing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import resnet

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"depth": 8, "epochs": 15, "constraint": "rescale", "every": 1, "batch_norm_momentum": 0.9},
    "cifar10": {"depth": 32, "epochs": 250, "constraint": "none", "every": 100, "batch_norm_momentum": 0.997},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options; where the default is None it depends on the data set, and what was used is saved in config.json."""

    dataset: Literal["digits", "cifar10"] = "digits"
    """Bundled handwritten digits (1,797 images, 8 x 8), or CIFAR-10."""
    data_dir: Path | None = None
    """CIFAR-10's official binary or python folder, or either archive, or a folder that holds one of them."""
    download: bool = False
    """Fetch CIFAR-10 (170 MB, checksum verified) if it is not in data_dir."""
    out_dir: Path | None = None
    """Where checkpoints, config.json, metrics.jsonl, summary.json, spectra.png and params.safetensors go. Default: a
    folder under runs/ named after the options, so that the same command finds its own run again."""
    depth: int | None = None
    """6n + 2 layers: 8, 14, 20, 32, ... Default: 32, for digits 8."""
    width: int = 16
    """Channels of the first stage."""
    batch_norm: bool = True
    """Batch normalisation before each ReLU."""
    batch_norm_momentum: float | None = None
    """Decay of the running statistics. Default: 0.997, for digits, with their few steps, 0.9."""
    epochs: int | None = None
    """Default: 250, for digits 15. The learning rate falls tenfold at 40 %, 60 % and 80 % of them."""
    batch_size: int = 128
    """Images a step, on all devices together."""
    optimizer: Literal["sgd", "conv-muon"] = "sgd"
    """SGD with momentum 0.9; or steepest descent in each convolution's operator norm, with AdamW for the rest."""
    learning_rate: float | None = None
    """Initial learning rate. Default: 0.1 * batch_size / 128, for conv-muon 0.05: then it is the most that a step moves
    a layer in operator norm, and AdamW's is a tenth of it."""
    epochs_per_decay: int | None = None
    """The learning rate falls tenfold every so many epochs, rather than at 40 %, 60 % and 80 %."""
    weight_decay: float = 2e-4
    """L2 penalty on all trainables; decoupled for conv-muon."""
    constraint: Literal["none", "clip", "rescale", "project", "reshape", "normalize"] | None = None
    """How the norms are constrained; reshape is the baseline that clips the kernel as an (o) x (i kh kw) matrix, which
    does not bound the operator norm; normalize rescales inside the forward pass, in every step. Default: none, for
    digits rescale."""
    max_norm: float = 1.0
    """The bound on each convolution's operator norm."""
    every: int | None = None
    """Constrain on one step in so many, and once more after the last. Default: 100, for digits 1."""
    norm_of: Literal["layer", "circular"] = "layer"
    """The bound is on the layer as it is (zero padding, strides), or on the paper's circular stand-in."""
    seed: int = 0
    """Of the initialisation, the shuffling and the augmentation."""
    seeds: int = 1
    """Train so many networks at once, with the seeds seed, seed + 1, ..."""
    bf16: bool = False
    """Compute in bfloat16; parameters, optimizer, batch statistics and loss stay in float32."""
    eval_batch_size: int = 1000
    """Images a step when testing."""

    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue where the folder's newest checkpoint stands, if there is one; must: an error if there is none;
    never: begin anew, which discards the folder's earlier run."""
    save_every: int = 10
    """Save a checkpoint every so many epochs, besides the last."""
    save_minutes: float = 5.0
    """And whenever so many minutes have passed since the last one."""
    keep: int = 2
    """How many checkpoints are kept."""
    max_steps: int | None = None
    """Stop after so many steps (rounded up to whole calls of the device) on the unchanged schedule, and report."""
    evaluate_only: Path | None = None
    """Test a checkpoint (OUT_DIR/checkpoints/STEP), a run's folder or its params.safetensors, and do not train."""
    certify: bool = False
    """At the end bound the network's Lipschitz constant, and report how many test images have a certified class and how
    many withstand an attack."""
    certify_images: int = 1000
    """Of at most so many test images."""
    halt_on_nan: bool = True
    """Stop at the end of an epoch whose loss is NaN or infinite. What came after the last finite checkpoint is not
    saved."""
    tensorboard: bool = False
    """Write OUT_DIR/tensorboard too (needs the package tensorboardX, the extra [tensorboard])."""
    devices: int | None = None
    """Spread each batch over so many local devices. Default: all."""
    deterministic: bool = False
    """On a GPU, only operations that give the same bits on every run, which exact resumption needs there. On a CPU
    all of them do."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to train on several hosts; out_dir must be on a file system that they share."""
    num_processes: int | None = None
    """How many processes, with --coordinator."""
    process_id: int | None = None
    """Which one of them this is, from 0."""


# These may differ when a run is resumed: they decide where it runs and what is kept, not what it computes.
FREE = frozenset(
    "data_dir download out_dir eval_batch_size resume save_every save_minutes keep max_steps evaluate_only certify "
    "certify_images halt_on_nan tensorboard devices deterministic coordinator num_processes process_id".split()
)


def resolve(config: Config) -> Config:
    """The configuration with nothing left open, checked."""
    check_types(config)
    chosen = {k: v for k, v in DEFAULTS[config.dataset].items() if getattr(config, k) is None}
    if config.learning_rate is None:
        chosen["learning_rate"] = 0.05 if config.optimizer == "conv-muon" else 0.1 * config.batch_size / 128
    config = dataclasses.replace(config, **chosen)
    resnet.blocks(config.depth, config.width)  # type: ignore[arg-type]
    counts = "width epochs batch_size eval_batch_size every seeds save_every keep certify_images max_steps devices"
    for name in (*counts.split(), "epochs_per_decay", "num_processes"):
        if (value := getattr(config, name)) is not None and not 1 <= value < 2**31:
            raise ValueError(f"expected {name} to be at least 1 and below 2^31, got {value}.")
    for name in ("learning_rate", "max_norm", "weight_decay"):
        if not _holds(value := getattr(config, name)) or value == 0 and name != "weight_decay":
            wanted = "0 or more" if name == "weight_decay" else "positive"
            raise ValueError(f"expected {name} to be {wanted}, and in float32 finite, got {value}.")
    if not 0 < config.save_minutes < math.inf:
        raise ValueError(f"expected save_minutes to be positive and finite, got {config.save_minutes}.")
    if not 0 <= config.seed < 2**63 - config.seeds:
        raise ValueError(f"expected seed to be 0 or more and below 2^63, got {config.seed}.")
    if not 0 <= config.batch_norm_momentum < 1:  # type: ignore[operator]
        raise ValueError(f"expected batch_norm_momentum to be in [0, 1), got {config.batch_norm_momentum}.")
    if config.constraint == "normalize" and config.norm_of == "circular":
        raise ValueError(
            "expected norm_of layer with constraint normalize (it takes layers as they are), got circular."
        )
    hosts = (config.coordinator, config.num_processes, config.process_id)
    if any(v is None for v in hosts) and any(v is not None for v in hosts):
        raise ValueError(f"expected coordinator, num_processes and process_id together or none of them, got {hosts}.")
    if config.process_id is not None and not 0 <= config.process_id < config.num_processes:  # type: ignore[operator]
        raise ValueError(f"expected process_id to be 0 or more and below num_processes, got {config.process_id}.")
    if config.coordinator is not None and not re.fullmatch(r"\S+:\d{1,5}", config.coordinator):
        raise ValueError(f"expected coordinator to be HOST:PORT, got {config.coordinator!r}.")
    if config.out_dir is None:
        config = dataclasses.replace(config, out_dir=Path("runs") / name_of(config))
    return config


def check_types(config: Config) -> None:
    """An error that names an option of another type, or of none of the values that it can have."""
    for name, kind in typing.get_type_hints(Config).items():
        value, choices = getattr(config, name), typing.get_args(kind)  # of a union or a Literal
        flat = [part for choice in choices or (kind,) for part in typing.get_args(choice) or (choice,)]
        accepted = [part for part in flat if isinstance(part, type)] + [int] * (float in flat)
        path = Path in flat and isinstance(value, Path)
        if not (type(value) in accepted or path or isinstance(value, str) and value in flat):
            wanted = " or ".join(repr(part) if isinstance(part, str) else part.__name__ for part in flat)
            raise ValueError(f"expected {name} to be one of {wanted}, got {value!r:.100}.")


def _holds(value: float) -> bool:
    """Whether float32 holds a number that is 0 or more, as neither zero nor infinity if it is neither."""
    limits = np.finfo(np.float32)
    return value == 0 or float(limits.tiny) <= value <= float(limits.max)


def plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def identity(config: Config) -> dict[str, Any]:
    """The options that decide what is computed."""
    return {k: v for k, v in plain(config).items() if k not in FREE}


def name_of(config: Config) -> str:
    """A folder's name for the run: readable, and different for different runs."""
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    bound = "" if config.constraint == "none" else f"{config.max_norm:g}"
    return f"{config.dataset}-resnet{config.depth}-{config.constraint}{bound}-{digest}"


def check_same(config: Config, saved: dict[str, Any]) -> None:
    """An error that names what differs from the configuration of the run that the folder holds."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    there = {k: saved.get(k, defaults[k]) for k in identity(config)}
    differ = [f"{k} is {there[k]} there and {v} here" for k, v in identity(config).items() if there[k] != v]
    if differ:
        raise ValueError(
            f"{config.out_dir}: expected a new folder, or one with a run of the same configuration, got one where "
            f"{', '.join(differ)}. Choose another --out-dir, or --resume never to discard that run."
        )


def load(saved: dict[str, Any]) -> Config:
    """The configuration that config.json holds."""
    known = {field.name: field.type for field in dataclasses.fields(Config)}
    paths = {"data_dir", "out_dir", "evaluate_only"}
    config = Config(**{k: Path(v) if k in paths and isinstance(v, str) else v for k, v in saved.items() if k in known})
    check_types(config)
    return config
