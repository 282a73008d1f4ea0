"""Looks at a machine, each at one thing: files are read, a program or two is asked, nothing is changed."""
