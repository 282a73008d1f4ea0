"""What the service logs: which events there are, what each line is about, and how journald gets it."""
