"""Move GPUs between their host drivers and vfio-pci, and back."""

__version__ = "0.1.0"
