"""Training with several processes.

pod         one process for each GPU of this pod
processes   what they agree on
nodes       several nodes: the step's pod, which starts a job and follows it
jobs        the job, as the cluster takes it
node        one of the job's pods
scratch     the folder in the bucket that they share
"""
