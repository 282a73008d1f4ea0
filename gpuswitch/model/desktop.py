"""What draws on the screen of a machine, by the names of its units."""

from __future__ import annotations

DISPLAY_MANAGER = "display-manager.service"
"""What distributions link to the display manager that is chosen."""
DISPLAY_MANAGERS = tuple(
    f"{name}.service" for name in ("gdm", "gdm3", "greetd", "lightdm", "lxdm", "ly", "plasmalogin", "sddm", "xdm")
)
"""By the names that distributions give them."""
