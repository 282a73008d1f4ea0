#!/bin/sh
# Writes down anew what an installation brings along: the newest versions that pyproject.toml allows, for every Python
# from 3.11 on, with the hashes of all their wheels. uv does that for all of them at once; it is kept nowhere.
#
#   lock.sh PYTHON
#
# What it is to take them from, it is told by its own environment (UV_DEFAULT_INDEX ...); no index is named in the files.
set -eu

cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
trap 'exit 1' HUP INT TERM
"$1" -m venv "$tools"
"$tools/bin/pip" --quiet --disable-pip-version-check install uv
compile() {
    "$tools/bin/uv" --quiet pip compile --no-config --universal --python-version 3.11 --only-binary :all: --upgrade \
        --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --no-header "$@"
}
compile pyproject.toml --output-file contrib/requirements.lock
"$1" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' |
    compile - --output-file contrib/build.lock
