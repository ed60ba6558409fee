"""The cluster, in plain JSON.

api           one request, and its refusals as messages
pods          why a pod is not running yet, and how it ended
kueue         why a queue does not admit a job, and its place there
account       what a pod runs as: token, namespace, the CA of the cluster's own services
"""
