"""What Debian does by itself at times, and tests want done at no time."""

from __future__ import annotations

TIMERS = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("logrotate.timer", "systemd-tmpfiles-clean.timer", "e2scrub_reap.service"),
)
"""Units, to be masked. Not all are there in every release."""
