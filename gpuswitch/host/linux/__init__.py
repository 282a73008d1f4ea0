"""The real host: sysfs, /dev, modprobe and netlink, behind the port that `host/port.py` owns."""
