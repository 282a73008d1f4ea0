#!/bin/sh
# Builds the page for Cockpit: `make cockpit`.
#
#   build.sh FOLDER
#
# FOLDER gets the files that lie in share/cockpit/gpuswitch later. What builds them is fetched by npm, as
# package-lock.json names it by hash, into .cache/cockpit of the project, and only where that has changed.
# FOLDER/.sources has the hashes of what it was built from, as sha256sum writes them: `make install` and `make deb`
# take no page that is older than its sources.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
tools=$project/.cache/cockpit
folder=$(realpath -m "$1")

mkdir -p "$tools"
if ! cmp -s "$here/package-lock.json" "$tools/installed.json"; then
    cp "$here/package.json" "$here/package-lock.json" "$tools/"
    # No package of these needs its scripts: esbuild's own program comes as a package of its own.
    npm --prefix "$tools" ci --ignore-scripts --no-audit --no-fund --loglevel=error
    cp "$here/package-lock.json" "$tools/installed.json"
fi
node "$here/build.js" "$tools" "$folder"
cd "$project"
sha256sum contrib/cockpit/*.* contrib/cockpit/gpuswitch/* contrib/cockpit/po/* gpuswitch/__init__.py \
    gpuswitch/cli/locale/*/gpuswitch.po >"$folder/.sources"
