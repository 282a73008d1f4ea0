"""How a switch is planned, run, taken back and kept."""
