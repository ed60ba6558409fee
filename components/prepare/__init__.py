"""The step prepare: a data set becomes token sequences of which only the answers are trained on.

input       files of any known format become conversations
rules       what is wrong with them: one table of rules, and the check that reports every fault with its place
tokenize    conversations become tokens, by the model's own chat template

dataset     the step itself; inputs: what it works on; rowfiles: what it writes; report: what it shows
checkup     the check without the step, for `tune16 data check`; clean: a repaired copy of the data set
results     what became of the rows, in numbers
"""
