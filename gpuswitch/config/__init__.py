"""Files and environment → frozen settings: every key, which layer set it, and what the service makes of them."""
