"""The operations, one folder per family: of each op plan, launches, fast NumPy, NumPy reference, cases."""
