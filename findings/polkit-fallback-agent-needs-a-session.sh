#!/bin/sh
# polkitd 122: an authentication agent that was registered as a fallback is not found for a caller without a session.
#
# pkttyagent(1) has --fallback "to not replace an existing authentication agent", and systemctl starts it like that. polkit
# finds an agent by the caller's process; if that one is a fallback, it looks for one of the caller's session first, and
# where there is no session it gives up, with the fallback in its hands (get_authentication_agent_for_subject in
# polkitbackendinteractiveauthority.c: `if (session_for_subject == NULL) goto out;`). So in a container, under cron or after
# `su`, nobody is asked, and the answer is the one for a machine without any agent. Registered without that option, the
# same agent is asked.
#
# Needs root, python3 with venv, dbus-daemon, util-linux, and the package polkitd. Seen with polkitd 122-3:
#   an agent: is asked
#   a fallback agent: is not asked, and the answer is 'a person would have to be asked'
set -eu
[ "$(id -u)" -eq 0 ] || { echo "this starts polkitd, which begins as root: run it as root" >&2; exit 1; }
folder=$(mktemp -d)
trap 'kill $polkit $bus 2>/dev/null || :; rm -rf "$folder"' EXIT
polkit= bus=
chmod 755 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jeepney==0.9.0
dpkg-query -W -f 'polkitd ${Version}\n' polkitd
cat >"$folder/bus.conf" <<END
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=$folder/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_type="method_call"/>
    <allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/><allow send_requested_reply="true" send_type="error"/>
  </policy>
</busconfig>
END
dbus-daemon --config-file="$folder/bus.conf" --nofork --nopidfile --print-address >"$folder/address" &
bus=$!
while [ ! -s "$folder/address" ]; do kill -0 "$bus"; done
export DBUS_SYSTEM_BUS_ADDRESS="unix:path=$folder/bus"
"$(ls /usr/lib/polkit-1/polkitd /usr/libexec/polkitd 2>/dev/null | head -n 1)" --no-debug &
polkit=$!
cat >"$folder/ask.py" <<'END'
import os
import sys
from pathlib import Path

from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

POLKIT = "org.freedesktop.PolicyKit1"
AUTHORITY = DBusAddress("/org/freedesktop/PolicyKit1/Authority", POLKIT, f"{POLKIT}.Authority")
caller, agent = open_dbus_connection(sys.argv[1]), open_dbus_connection(sys.argv[1])
while not caller.send_and_get_reply(message_bus.NameHasOwner(POLKIT)).body[0]:
    pass
started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
process = ("unix-process", {"pid": ("u", os.getpid()), "start-time": ("t", started), "uid": ("i", os.getuid())})
options = {"fallback": ("b", True)} if sys.argv[2] == "fallback" else {}
registered = agent.send_and_get_reply(
    new_method_call(
        AUTHORITY, "RegisterAuthenticationAgentWithOptions", "(sa{sv})ssa{sv}", (process, "C", "/agent", options)
    )
)
assert registered.header.message_type is MessageType.method_return, registered.body
me = ("system-bus-name", {"name": ("s", caller.unique_name)})
question = (me, "org.freedesktop.policykit.exec", {}, 1, "")
caller.send(new_method_call(AUTHORITY, "CheckAuthorization", "(sa{sv})sa{ss}us", question))
if sys.argv[2] == "fallback":
    yes, challenge, _ = caller.receive(timeout=20).body[0]
    assert (yes, challenge) == (False, True), (yes, challenge)
    print("a fallback agent: is not asked, and the answer is 'a person would have to be asked'")
else:
    while (asked := agent.receive(timeout=20)).header.message_type is not MessageType.method_call:
        pass
    assert asked.header.fields[HeaderFields.member] == "BeginAuthentication"
    print("an agent: is asked")
END
for kind in plain fallback; do
    setpriv --reuid=65534 --regid=65534 --clear-groups "$folder/venv/bin/python" "$folder/ask.py" "$DBUS_SYSTEM_BUS_ADDRESS" $kind
done
