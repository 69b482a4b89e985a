"""Fast NumPy: blocked, threaded implementations behind the `numpy` device, each checked against ops/."""
