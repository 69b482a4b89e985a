"""What looks at the rest: proofs, the kernel workbench, the profiler, the doctor.

Nothing but the CLI and the tests imports it.
"""
