"""Models as files and in memory.

references  names of models and data sets
fetching    references are fixed to their content, and fetched: hub, https, S3, this disk
tensors     safetensors, one tensor at a time
shapes      a model's sizes
loading     a base model on the device at hand
stopping    where answers end: one rule for evaluation, publication and serving
pieces      a token's text
labels      what each token has to predict
"""
