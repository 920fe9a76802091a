"""The table of presses, and what must be known of one."""
