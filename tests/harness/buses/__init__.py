"""Message buses for the tests, each private to one: dbus-daemon, or dbus-broker as today's distributions have it."""
