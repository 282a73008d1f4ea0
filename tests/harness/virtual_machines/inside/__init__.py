"""Files for the machines' disk; disk.py says where each goes."""
