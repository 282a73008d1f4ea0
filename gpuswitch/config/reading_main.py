"""Reads the configuration for the service: see `reading.py`.

Run as `python -ISE reading_main.py DIRECTORY FOLDER...`, the folders being those in which the service finds its
libraries. What is found goes to the standard output.
"""

import sys

sys.path.extend(sys.argv[2:])

from gpuswitch.config.reading import tell

if __name__ == "__main__":
    tell(sys.argv[1], 1)
