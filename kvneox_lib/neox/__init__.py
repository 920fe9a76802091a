"""The model seen as Llama, and what it stores."""
