"""The one process per attempt, on the head node: it drives Ray Train, records metrics and writes how the attempt ended.

`__main__` is the process, `attempt` its course, `policy` decides what follows an outcome, `trainer` is one call of Ray
Train, `cluster` is Ray itself, `preflight` what only the cluster can tell, `recorder` the metrics.
"""
