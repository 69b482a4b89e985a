"""`python -m segnet_scratch` is `segnet`: for a source tree that is not installed."""

from segnet_scratch.cli import main

main()
