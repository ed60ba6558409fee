"""Conversations become token sequences of which only the answers are trained on.

chat        chat templates: the model's own, or one of templates/
tokens      rows of token ids and labels, and what is lost on the way
"""
