"""What makes a host busy. Tests put it into a machine when they want it; see the modules for the words.

    nvidia.py    the driver with NVIDIA's manners, and its persistenced
    programs.py  programs that hold device nodes: a game, a stubborn one, one that hides what it holds
    crash.py     a service that dies, or finds the disk full, at a chosen write of its journal
    desk.py      a person: a session on a seat, sound, a display manager or compositor

Every word returns when what it says is so, and never waits for luck.
"""
