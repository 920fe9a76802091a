"""What comes from outside: weights and text."""
