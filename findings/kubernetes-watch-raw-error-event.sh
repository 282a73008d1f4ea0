#!/bin/sh
# kubernetes (the Python client): a watch without deserialization ends in a KeyError where the server ends it with an ERROR event.
#
# A watch whose resourceVersion is too old ends with an event of type ERROR, whose object is a Status of code 410 ("Efficient
# detection of changes", API concepts). Watch.stream (kubernetes/watch/watch.py) makes ApiException of it, or begins anew; but
# it reads `raw_object` of the event for that, which is there only after deserialization. With `deserialize=False`, whoever
# catches ApiException, as is right otherwise, does not catch this.
#
# Needs python3 (3.11 or later) with venv, and the network for pip. Seen with kubernetes 37.0.2:
#   deserialize=True: ApiException: (410)
#   deserialize=False: KeyError: 'raw_object'
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'kubernetes==37.0.2'
cat >"$folder/watch.py" <<'END'
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from kubernetes import client, watch

GONE = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410, "message": "too old"}


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"type": "ERROR", "object": GONE}).encode() + b"\n")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
Thread(target=server.serve_forever, daemon=True).start()
settings = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
nodes = client.CoreV1Api(client.ApiClient(settings)).list_node
for deserialize in True, False:
    try:
        list(watch.Watch().stream(nodes, resource_version="1", deserialize=deserialize, timeout_seconds=1))
    except Exception as error:
        print(f"deserialize={deserialize}: {type(error).__name__}: {str(error).splitlines()[0]}")
END
said=$("$folder/venv/bin/python" "$folder/watch.py")
echo "$said"
[ "$said" = "deserialize=True: ApiException: (410)
deserialize=False: KeyError: 'raw_object'" ]
