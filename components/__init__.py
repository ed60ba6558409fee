"""The steps of a fine-tune, one folder each, and the packages that they share.

The steps, in the order of the pipeline:

    preflight   names become fixed references, settings are checked, the GPU's memory is planned
    prepare     rows become token sequences; some are held out
    quantize    the base model becomes a 4-bit checkpoint
    train       an adapter is trained on it
    evaluate    base and tuned model are compared on the rows held out
    merge       the adapter is added to the full-precision base model
    convert     the merged model becomes GGUF files, each tested on held-out rows
    upload      the result becomes a version in S3, and the champion
    register    the version is entered in the model registry
    deploy      and served

What they share; each package's docstring lists its modules:

    runtime     what a step runs in: progress lines, errors, output folders, reports, redaction
    storage     S3 and what is kept there: versions, the champion log, leases, records of runs
    models      models as files and in memory: references, safetensors, sizes, loading
    planning    the GPU's memory and the nodes' disk, known before anything runs
    engine      the 16 GB training engine
    kubernetes  the cluster's API; why pods and jobs wait, and how they ended
    playground  a server and a chat page for a finished model

In each step's folder ``component.py`` is the pipeline's wrapper and the other files are the logic: plain functions,
paths in, files out, numbers returned. ``config.py`` holds every setting. `python -m components STEP` runs one step on
local folders.
"""
