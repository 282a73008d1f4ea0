"""What is kept for each GPU, on disk."""
