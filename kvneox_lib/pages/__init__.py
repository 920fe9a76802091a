"""What notebooks and report share: analysis, words, pictures."""
