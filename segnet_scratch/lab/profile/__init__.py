"""What `segnet profile` measures: every op of a training step, or one op in all its rungs, counted and timed.

Counts come from the ops' plans, times from the device's own clock, static figures from the compiler; what is reached is
held against ceilings that are measured in the same run.
"""
