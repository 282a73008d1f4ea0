"""What the scanner does, for its own process: the standard library only."""
