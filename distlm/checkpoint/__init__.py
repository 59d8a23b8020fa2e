"""Checkpoints as files: what they are, how they are committed, verified, kept and exported. No torch, no numpy.

Both planes meet here: the workers write and read checkpoints, the controller chooses one to continue from, and the
client lists them. What a DeepSpeed engine puts into one is in `distlm.worker.checkpoint`.
"""
