"""The steps of a fine-tune, one folder each, in the order of the pipeline.

    preflight   names become fixed references, settings are checked, the GPU's memory is planned
    prepare     rows become token sequences; some are held out
    quantize    the base model becomes a 4-bit checkpoint
    train       an adapter is trained on it
    evaluate    base and tuned model are compared on the rows held out
    merge       the adapter is added to the full-precision base model
    convert     it becomes GGUF files, which are asked what they still know
    upload      the result becomes a version in S3, and the champion
    register    the version is entered in the model registry
    deploy      and served

In each folder ``component.py`` is the pipeline's wrapper and the other files are the logic: plain functions, paths in,
files out, numbers returned. ``config.py`` holds every knob. ``serve`` and ``chat`` are no steps: they put a model that
was made behind an API and a page. `python -m components STEP` runs one step on local folders.
"""
