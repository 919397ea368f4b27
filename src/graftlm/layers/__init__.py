"""What stands in the place of a base's modules: `Adapted` (its product, changed) and `ModulesToSaveWrapper` (a copy of it).

A method brings a `Change`. All else about a layer (whose turn it is, mixed batches, merging) is answered here, for all
methods alike.
"""

from .adapted import Adapted, adapted_layers
from .attention import AdaptedAttention, around, unfuse
from .change import Change, Held, LowRank
from .frozen import KINDS, Frozen, as_it_was, both_forms, frozen_of, is_product
from .parameter import AdaptedParameter, module_of, parameters_of
from .saved import ModulesToSaveWrapper, find_modules, save_modules, saved_modules, unsave_modules

__all__ = [
    "KINDS",
    "Adapted",
    "AdaptedAttention",
    "AdaptedParameter",
    "Change",
    "Frozen",
    "Held",
    "LowRank",
    "ModulesToSaveWrapper",
    "around",
    "adapted_layers",
    "as_it_was",
    "both_forms",
    "find_modules",
    "frozen_of",
    "is_product",
    "module_of",
    "parameters_of",
    "save_modules",
    "saved_modules",
    "unfuse",
    "unsave_modules",
]
