"""SegNet on a GPU beside PyTorch at its best; `scripts/bench_vs_torch.py --device cuda` runs it."""
