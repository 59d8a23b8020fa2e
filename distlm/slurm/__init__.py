"""What a Slurm job runs: `python -m distlm.slurm RUN_FOLDER` on its first node.

__main__    the job: the run's next attempt, and back into the queue if its time is over before the training is
allocation  what Slurm has given to the job
ray_nodes   Ray on all nodes of the job, as long as an attempt lasts
node        one of them, started by srun
"""
