from kvneox_lib.modeling import KVNeoXForCausalLM, adapt
from kvneox_lib.presses import check_press, expand_presses, make_press, press_names

__all__ = ["KVNeoXForCausalLM", "adapt", "check_press", "expand_presses", "make_press", "press_names"]
