"""Tasks for lm-evaluation-harness: a row of YAML for each, and the documents that they ask about."""
