"""Finished switches, kept beside the event loop."""
