"""Facts → guards → requirements → plan."""
