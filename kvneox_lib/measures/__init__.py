"""What can be asked of a model under a press."""
