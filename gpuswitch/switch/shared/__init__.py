"""What several GPUs share: units, consoles, turns at a driver, sleep, and libvirt's books."""
