#!/bin/sh
# Builds the page for Cockpit: `make cockpit`.
#
#   build.sh FOLDER
#
# FOLDER gets the files that lie in share/cockpit/gpuswitch later. What builds them is fetched by npm, as
# package-lock.json names it by hash, into .cache/cockpit of the project, and only where that has changed.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tools=$here/../../.cache/cockpit
folder=$1

mkdir -p "$tools"
if ! cmp -s "$here/package-lock.json" "$tools/installed.json"; then
    cp "$here/package.json" "$here/package-lock.json" "$tools/"
    # No package of these needs its scripts: esbuild's own program comes as a package of its own.
    npm --prefix "$tools" ci --ignore-scripts --no-audit --no-fund --loglevel=error
    cp "$here/package-lock.json" "$tools/installed.json"
fi
node "$here/build.js" "$tools" "$folder"
