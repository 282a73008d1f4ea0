"""All GPUs, and the virtual machines that own them."""
