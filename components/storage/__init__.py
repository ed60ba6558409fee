"""S3, and what is kept there, independent of the steps.

s3          objects and folders
transfer    one file, in parts
files       SHA-256, lists of files, safe names
retry       which faults of S3 are tried again, and what is said when that does not help
artifacts   a pipeline's outputs, where the connection's own storage has them
lease       one holder at a time
versions    a model's versions, their manifests, the champion log
records     how runs ended
signing     signatures of manifests
"""
