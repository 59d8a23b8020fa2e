"""What distlm does in the pods of a run on Kubernetes, besides the job itself (`distlm.ray_job`).

submit_job  the submitter: gives the job to Ray's head, prints its output, and notices when the head is gone
pre_stop    what a pod does before it ends: its workers save
"""
