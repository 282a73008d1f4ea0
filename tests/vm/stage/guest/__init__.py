"""Programs that the stage puts into machines."""
