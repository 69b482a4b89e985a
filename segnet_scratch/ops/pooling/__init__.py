"""Argmax max-pool, index unpool, and the codes between them."""
