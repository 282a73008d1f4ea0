#!/bin/sh
# Prints the program of this name for an environment of its own: what pip makes of pyproject.toml's [project.scripts].
#
#   program.sh NAME ENVIRONMENT
set -eu
entry=$(sed -n "s/^$1 = \"\(.*\)\"$/\1/p" pyproject.toml)
cat <<END
#!$2/bin/python3 -I
import sys

from ${entry%:*} import ${entry#*:}

sys.exit(${entry#*:}())
END
