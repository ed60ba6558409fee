"""The cluster, in plain JSON.

api           one request, and its refusals in our words
pods          why a pod does not run yet, and how it ended
kueue         why a queue does not admit a job, and its place there
certificates  the CA of the cluster's own services
"""
