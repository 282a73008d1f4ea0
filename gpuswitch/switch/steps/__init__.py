"""What a step is, and the steps: one file for each kind of thing that they touch."""
