"""Programs that the setups put into machines."""
