"""Programs for the machines, run by the Python that the project is installed with."""
