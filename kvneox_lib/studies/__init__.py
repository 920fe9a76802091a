"""The table of studies: what is to be run, how it is kept and found again."""
