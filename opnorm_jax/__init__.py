"""Exact spectra, certified norms and projections of convolutional layers, as JAX functions.

Start with :func:`singular_values`, :func:`operator_norm_bounds` and :func:`constrain_operator_norm`.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from opnorm_jax._conv import Conv, Unknown
from opnorm_jax._execution import Execution
from opnorm_jax._kernel.bounds import Bounds, operator_norm_bounds, operator_norm_upper_bound
from opnorm_jax._kernel.constrain import (
    clip_operator_norm,
    project_operator_norm,
    project_operator_norm_info,
    rescale_operator_norm,
)
from opnorm_jax._kernel.inverse import log_abs_det, solve
from opnorm_jax._kernel.nearest import ProjectionInfo
from opnorm_jax._kernel.norm import operator_norm
from opnorm_jax._kernel.spectrum import singular_values
from opnorm_jax._kernel.steepest import Steepest, steepest_direction
from opnorm_jax._kernel.two_sided import clip_singular_values
from opnorm_jax._program.find_convs import find_convs
from opnorm_jax._program.lipschitz import lipschitz_bound
from opnorm_jax._tree.muon import ScaleByConvMuonState, conv_muon, scale_by_conv_muon
from opnorm_jax._tree.normalize import normalize
from opnorm_jax._tree.plot import plot_spectra
from opnorm_jax._tree.radius import certified_radius
from opnorm_jax._tree.report import LayerReport, SpectralReport, spectral_report
from opnorm_jax._tree.transform import ConstrainOperatorNormState, constrain, constrain_operator_norm

if _TYPE_CHECKING:
    from opnorm_jax import equinox as equinox
    from opnorm_jax import linen as linen
    from opnorm_jax import nnx as nnx

__version__ = "0.1.0"

__all__ = [
    "Bounds",
    "ConstrainOperatorNormState",
    "Conv",
    "Execution",
    "LayerReport",
    "ProjectionInfo",
    "ScaleByConvMuonState",
    "SpectralReport",
    "Steepest",
    "Unknown",
    "certified_radius",
    "clip_operator_norm",
    "clip_singular_values",
    "constrain",
    "constrain_operator_norm",
    "conv_muon",
    "find_convs",
    "lipschitz_bound",
    "log_abs_det",
    "normalize",
    "operator_norm",
    "operator_norm_bounds",
    "operator_norm_upper_bound",
    "plot_spectra",
    "project_operator_norm",
    "project_operator_norm_info",
    "rescale_operator_norm",
    "scale_by_conv_muon",
    "singular_values",
    "solve",
    "spectral_report",
    "steepest_direction",
]


_FRAMEWORKS = ("equinox", "linen", "nnx")


def __getattr__(name: str) -> object:
    """Imports the wrappers of a framework's layers when they are first asked for: ``linen``, ``nnx``, ``equinox``."""
    if name in _FRAMEWORKS:
        return _importlib.import_module(f"opnorm_jax.{name}")
    raise AttributeError(f"module 'opnorm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_FRAMEWORKS]
