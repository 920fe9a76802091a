"""Training-free KV-cache compression on GPT-NeoX models, with the presses of kvpress."""

from kvneox_lib.modeling import KVNeoXForCausalLM, adapt
from kvneox_lib.models import LoadedModel, load_model
from kvneox_lib.presses import check_press, expand_presses, make_press, press_names

__all__ = [
    "KVNeoXForCausalLM",
    "LoadedModel",
    "adapt",
    "check_press",
    "expand_presses",
    "load_model",
    "make_press",
    "press_names",
]
