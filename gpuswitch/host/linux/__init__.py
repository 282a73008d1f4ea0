"""The real host: sysfs, /dev, modprobe and netlink, behind the port that `switch/host.py` owns."""
