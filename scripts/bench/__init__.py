"""SegNet beside PyTorch at its best, on a GPU and on CPUs; `scripts/bench_vs_torch.py` runs it.

cases.py        what is measured, and what every contender is given
contenders.py   ours and PyTorch's, on one batch that both get
gate.py         nothing is timed before it is right
timing.py       times in turn
run.py          cases, table, JSON
end_to_end.py   `segnet train` beside the bare step
layers.py       ceilings of a GPU, single convolutions; the host device
"""
