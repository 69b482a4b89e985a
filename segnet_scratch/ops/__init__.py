"""The operations, a chapter a folder: of each its plan and launches, its fast NumPy, its NumPy reference, its cases."""
