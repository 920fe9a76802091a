from kvneox_lib.modeling import KVNeoXForCausalLM, adapt

__all__ = ["KVNeoXForCausalLM", "adapt"]
