"""Labels: what each token has to predict."""

IGNORED = -100  # of a token that does not count in the loss, as in torch's cross-entropy
