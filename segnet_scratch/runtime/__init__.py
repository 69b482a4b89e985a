"""How a kernel gets to run: found, parsed, compiled, checked and launched, on one of three devices.

The lowest layer: it knows of no op and no network. `launch` is the only way to a kernel in this project.
"""
