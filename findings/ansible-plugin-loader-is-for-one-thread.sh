#!/bin/sh
# ansible-core: two threads that ask its loader for a plugin at the same time get half of one.
#
# PluginLoader._load_module_source (ansible/plugins/loader.py) puts the module into sys.modules, runs it, and looks there
# first, without a lock: who comes second finds a module that has not been run yet, and takes its class from it. An
# inventory plugin that asks many hosts at once, in threads, has to have all plugins loaded before.
#
# Needs python3 (3.11 or later) with venv, and the network for pip. Seen with ansible-core 2.19.14, most times; it tries up to 20:
#   module 'ansible.plugins.connection.ssh' has no attribute 'Connection'
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'ansible-core==2.19.14'
cat >"$folder/together.py" <<'END'
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from ansible.plugins.loader import connection_loader, init_plugin_loader

init_plugin_loader()
together = Barrier(8)


def get(_):
    together.wait()
    try:
        connection_loader.get("ssh", class_only=True)
    except AttributeError as error:
        return str(error)


with ThreadPoolExecutor(8) as pool:
    said = list(filter(None, pool.map(get, range(8))))
print(*said[:1])
sys.exit(not said)
END
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    HOME=$folder "$folder/venv/bin/python" "$folder/together.py" && exit
done
echo "not seen"
exit 1
