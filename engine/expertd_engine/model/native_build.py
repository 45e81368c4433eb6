"""Makes the native path of a loaded model and holds every layer of it to transformers' modules before it is used.

A layer that the matcher recognises is run natively on what its module was given in the probe (`native_witness`); its
output, keys and values must be the module's, but for rounding. What the module graph leaves open is tried out: the
variant with the smallest error counts, if that is small. One layer that differs, and the model runs as transformers has
it, with native experts alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from expertd_engine.experts.store_format import DENSE_NAME
from expertd_engine.kernels.library import Pool
from expertd_engine.model.attention import KVStorage, LayerShape
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.native_abi import Rope
from expertd_engine.model.native_match import Matched, match_layer, match_matrix, match_norm, set_variant, variants
from expertd_engine.model.native_model import TOKENS_ALIGNED, Ends, NativeLayer, NativeModel
from expertd_engine.model.native_witness import LayerSeen, NotMatched, StandInExperts, Witness, witness
from expertd_engine.model.router_kinds import ModuleRouterAdapter, adapt_router
